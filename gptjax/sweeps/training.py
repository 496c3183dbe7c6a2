"""Trains trials: HOW names the ways. What is to be trained comes in, results go out; who chose them does not matter.

In this process, one run of gptjax.training.loop after the other: a trial then costs no new start of Python and jax,
what goes wrong has its type and its words, and a trial that is worse than others is stopped from its own listener. The
price is that a crash of the machinery ends the sweep; the same command then goes on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax import config as configs
from gptjax import console
from gptjax.config import ConfigError, Diverged
from gptjax.sweeps.results import DIVERGED, DONE, PRUNED, Result
from gptjax.sweeps.trials import Trial
from gptjax.sweeps.watch import Watch

Line = dict[str, Any]


class Pruned(Exception):
    """Raised by a trial's listener to stop it: others are better."""


def problem(config: Any) -> str:
    """What makes a config, of a trial, one that cannot be trained here; "" where nothing does."""
    from gptjax.training import job

    if config.init_from:  # its model is another run's, whose config is read when the trial begins
        return ""
    try:
        job.check(configs.resolve(config))
    except ConfigError as error:
        return str(error)
    return ""


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


def one_after_the_other(trials: Sequence[Trial], watch: Watch) -> Iterator[Result]:
    """Each trial's result as soon as it is there."""
    for trial in trials:
        watch.begin(trial)
        yield train(trial, watch)


HOW: dict[str, Callable[[Sequence[Trial], Watch], Iterator[Result]]] = {"one after the other": one_after_the_other}
