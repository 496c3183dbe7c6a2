"""Trains trials in one way or another. What is to be trained comes in, results go out; who chose them does not matter.

In this process, as one program or one run of gptjax.training.loop after the other: a trial then costs no new start of
Python and jax, what goes wrong has its type and its words, and a trial that is worse than others is stopped by its
listener. The price is that a crash of the machinery ends the sweep; the same command then goes on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from gptjax import config as configs
from gptjax.config.errors import ConfigError, Diverged
from gptjax.core import console
from gptjax.sweeps.results import DIVERGED, DONE, PRUNED, Result
from gptjax.sweeps.trials import Trial
from gptjax.sweeps.watch import Watch, format_values

Line = dict[str, Any]


class Pruned(Exception):
    """Raised by a trial's listener to stop it: others are better."""


def problem(config: Any) -> str:
    """What makes a config, of a trial, one that cannot be trained here; "" where nothing does."""
    from gptjax.training import memory, setup

    if config.init_from:  # its model is another run's, whose config is read when the trial begins
        return ""
    try:
        resolved = configs.resolve(config)
        setup.check(resolved)
        memory.check_config(resolved)
    except ConfigError as error:
        return str(error)
    return ""


def check(trials: Sequence[Trial], as_trained: Callable[[Any], Any] = lambda config: config) -> None:
    """Raises ConfigError for trials of which one cannot be; `as_trained`: what training makes of a config."""
    for trial in trials:
        if why := problem(as_trained(trial.config)):
            raise ConfigError(f"the trial {format_values(trial.values)} cannot be: {why}")


def train(trial: Trial, watch: Watch, on_line: Callable[[Line], None] = lambda line: None) -> Result:
    """Trains a trial, goes on with it, or finds it finished.

    Args:
      trial: what to train.
      watch: is shown its lines.
      on_line: gets them too, and may raise Pruned.

    Raises:
      UserError, Interrupted: as gptjax.training.loop.train.
    """
    import jax

    from gptjax.training import loop

    last: Line = {}
    looked: dict[str, float] = {}

    def listen(line: Line) -> None:
        last.update(line)
        if (loss := line.get("val/loss")) is not None:
            looked["loss"] = loss
        watch.line(trial, line)
        on_line(line)

    def so_far(status: str, loss: float | None, note: str = "") -> Result:
        rate = last.get("tokens_per_second")
        return Result(trial.name, trial.values, status, loss, last.get("step", 0), last.get("seconds", 0.0), rate, note)

    try:
        with console.quiet():
            summary = loop.train(trial.config, trial.workdir, listen)
    except Pruned:
        return so_far(PRUNED, looked["loss"])
    except Diverged as error:
        return so_far(DIVERGED, None, str(error))
    finally:
        jax.clear_caches()  # a program keeps memory, and the next trial compiles its own
    last.update(summary | {"step": summary["steps"]})
    loss = summary["val_loss"]
    return so_far(DONE, loss) if math.isfinite(loss) else so_far(DIVERGED, None, f"the held-out loss is {loss}")


def train_sequentially(trials: Sequence[Trial], watch: Watch) -> Iterator[Result]:
    """Each trial's result as soon as it is there."""
    for trial in trials:
        watch.begin(trial)
        yield train(trial, watch)


def train_vmapped(trials: Sequence[Trial], watch: Watch, every_steps: int = 0) -> Iterator[Result]:
    """Each trial's result once all are trained, by gptjax.training.population; members evolve every so many steps."""
    from gptjax.training.population import population
    from gptjax.training.population.evolution import Evolution

    last: list[Line] = [{} for _ in trials]

    def listen(member: int, line: Line) -> None:
        last[member].update(line)
        watch.trial = trials[member]
        watch.line(trials[member], line)

    if not trials:
        return
    watch.begin(trials[0])
    evolution = Evolution(every_steps) if every_steps else None
    with console.quiet():
        found = population.train(
            [trial.config for trial in trials], [trial.workdir for trial in trials], listen, evolution=evolution
        )
    for trial, summary, line in zip(trials, found, last, strict=True):
        steps, seconds, rate = line.get("step", 0), line.get("seconds", 0.0), line.get("tokens_per_second")
        if summary:
            seconds, note = summary["seconds"], evolution_note(trial)
            yield Result(trial.name, trial.values, DONE, summary["val_loss"], summary["steps"], seconds, rate, note)
        else:
            yield Result(trial.name, trial.values, DIVERGED, None, steps, seconds, rate, "its steps went bad for good")


def evolution_note(trial: Trial) -> str:
    """What became of the values of a member that took another's place; "" of one that has those it began with."""
    from gptjax.training.population import evolution

    lines = evolution.lines(trial.workdir)
    return f"evolved: {format_values(lines[-1]['values'])} from step {lines[-1]['step']:,} on" if lines else ""


def check_vmapped(every_steps: int, trials: Sequence[Trial]) -> None:
    """Raises ConfigError for trials that cannot be one program, or whose members cannot evolve."""
    from gptjax.training.population import population
    from gptjax.training.population.evolution import Evolution

    check(trials, population.on_one_device)
    evolution = Evolution(every_steps) if every_steps else None
    population.check([configs.resolve(trial.config) for trial in trials], [trial.config for trial in trials], evolution)


class Backend(NamedTuple):
    """How trials are trained.

    Attributes:
      train: gives each trial's result.
      check: raises ConfigError where it cannot.
    """

    train: Callable[[Sequence[Trial], Watch], Iterator[Result]]
    check: Callable[[Sequence[Trial]], None]


SEQUENTIAL = Backend(train_sequentially, check)


def vmapped_backend(every_steps: int = 0) -> Backend:
    """All as one program, whose members evolve every so many steps; 0: they do not."""
    return Backend(partial(train_vmapped, every_steps=every_steps), partial(check_vmapped, every_steps))
