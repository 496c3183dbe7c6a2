"""Backends that train trials: one after another, or all as one compiled program.

Trials are trained in this process: they need no new start of Python and jax, errors keep their types and messages, and
a callback can stop a trial that is worse than others. A crash of the process ends the sweep; the same command resumes
it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from gptjax.config.errors import ConfigError, Diverged
from gptjax.core import console
from gptjax.runs import config as configs
from gptjax.sweeps.results import DIVERGED, DONE, PRUNED, Result
from gptjax.sweeps.trials import Trial
from gptjax.sweeps.watch import Watch, format_values
from gptjax.training import loop, memory, setup
from gptjax.training.population import evolution, population
from gptjax.training.population.evolution import Evolution

Line = dict[str, Any]


class Pruned(Exception):
    """Raised by the callback of a trial to stop it, because others are better."""


def problem(config: Any) -> str:
    """Returns the problem of a trial's config that cannot be trained here, or ""."""
    if config.init_from:  # its model comes from another run, whose config is read when the trial starts
        return ""
    try:
        resolved = configs.resolve(config)
        setup.check(resolved)
        memory.check_config(resolved)
    except ConfigError as error:
        return str(error)
    return ""


def check(trials: Sequence[Trial], as_trained: Callable[[Any], Any] = lambda config: config) -> None:
    """Raises ConfigError for an invalid trial; `as_trained` maps a config to the one that is trained."""
    for trial in trials:
        if why := problem(as_trained(trial.config)):
            raise ConfigError(f"the trial {format_values(trial.values)} is impossible: {why}")


def train(trial: Trial, watch: Watch, on_line: Callable[[Line], None] = lambda line: None) -> Result:
    """Trains or resumes a trial, unless it is finished.

    Args:
      trial: to train.
      watch: shows its lines of metrics.
      on_line: called with each line; may raise Pruned.

    Raises:
      UserError, Interrupted: see gptjax.training.loop.train.
    """
    last: Line = {}
    evaluation: dict[str, float] = {}

    def listen(line: Line) -> None:
        last.update(line)
        if (loss := line.get("val/loss")) is not None:
            evaluation["loss"] = loss
        watch.line(trial, line)
        on_line(line)

    def result(status: str, loss: float | None, note: str = "") -> Result:
        rate = last.get("tokens_per_second")
        return Result(trial.name, trial.values, status, loss, last.get("step", 0), last.get("seconds", 0.0), rate, note)

    try:
        with console.quiet():
            summary = loop.train(trial.config, trial.workdir, listen)
    except Pruned:
        return result(PRUNED, evaluation["loss"])
    except Diverged as error:
        return result(DIVERGED, None, str(error))
    finally:
        jax.clear_caches()  # compiled programs keep memory, and the next trial compiles its own
    last.update(summary | {"step": summary["steps"]})
    loss = summary["val_loss"]
    return result(DONE, loss) if math.isfinite(loss) else result(DIVERGED, None, f"the held-out loss is {loss}")


def train_sequentially(trials: Sequence[Trial], watch: Watch) -> Iterator[Result]:
    """Yields the result of each trial as soon as it is finished."""
    for trial in trials:
        watch.begin(trial)
        yield train(trial, watch)


def train_vmapped(trials: Sequence[Trial], watch: Watch, every_steps: int = 0) -> Iterator[Result]:
    """Trains all trials as one population; yields their results. Members evolve every `every_steps` steps; 0: never."""
    from gptjax.training.population.evolution import Evolution

    last: list[Line] = [{} for _ in trials]

    def listen(member: int, line: Line) -> None:
        last[member].update(line)
        watch.trial = trials[member]
        watch.line(trials[member], line)

    if not trials:
        return
    watch.begin(trials[0])
    options = Evolution(every_steps) if every_steps else None
    with console.quiet():
        summaries = loop.train_population(
            [trial.config for trial in trials], [trial.workdir for trial in trials], listen, evolution=options
        )
    for trial, summary, line in zip(trials, summaries, last, strict=True):
        steps, seconds, rate = line.get("step", 0), line.get("seconds", 0.0), line.get("tokens_per_second")
        if summary:
            seconds, note = summary["seconds"], evolution_note(trial)
            yield Result(trial.name, trial.values, DONE, summary["val_loss"], summary["steps"], seconds, rate, note)
        else:
            yield Result(trial.name, trial.values, DIVERGED, None, steps, seconds, rate, "too many bad steps in a row")


def evolution_note(trial: Trial) -> str:
    """Describes the final values of a member that evolved; "" for a member with its initial values."""
    lines = evolution.lines(trial.workdir)
    return f"evolved: {format_values(lines[-1]['values'])} from step {lines[-1]['step']:,} on" if lines else ""


def check_vmapped(every_steps: int, trials: Sequence[Trial]) -> None:
    """Raises ConfigError for trials that cannot be one compiled program, or cannot evolve."""
    check(trials, population.on_one_device)
    options = Evolution(every_steps) if every_steps else None
    population.check([configs.resolve(trial.config) for trial in trials], [trial.config for trial in trials], options)


class Backend(NamedTuple):
    """A way to train trials.

    Attributes:
      train: yields the result of each trial.
      check: raises ConfigError for trials that cannot be trained.
    """

    train: Callable[[Sequence[Trial], Watch], Iterator[Result]]
    check: Callable[[Sequence[Trial]], None]


SEQUENTIAL = Backend(train_sequentially, check)


def vmapped_backend(every_steps: int = 0) -> Backend:
    """Backend that trains all trials as one compiled program; members evolve every `every_steps` steps; 0: never."""
    return Backend(partial(train_vmapped, every_steps=every_steps), partial(check_vmapped, every_steps))
