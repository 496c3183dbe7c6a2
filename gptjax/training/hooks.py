"""Hooks: what the training loop does after every so many steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptjax.runs.train_state import TrainState
from gptjax.training.population.members import Values


class StepInfo(NamedTuple):
    """Result of a step, which hooks read and may replace.

    Attributes:
      step: just taken, counted from 1.
      state: after it, of all members of the population.
      values: the numbers in which members differ.
      quality: metrics of each member on held-out text after this step; empty if they were not evaluated.
      saved: True if a checkpoint of this step is being written.
    """

    step: int
    state: TrainState
    values: Values
    quality: Sequence[dict[str, float]] = ()
    saved: bool = False


class Hook(NamedTuple):
    """A function that is called after steps.

    Attributes:
      call: takes the StepInfo; may return the one that later hooks, and the loop, continue with.
      every: number of steps between two calls.
      at_end: also called after the last step.
    """

    call: Callable[[StepInfo], StepInfo | None]
    every: int = 1
    at_end: bool = False


def run_hooks(hooks: Sequence[Hook], info: StepInfo, last: int) -> StepInfo:
    """Calls the hooks that are due after a step, in order.

    Args:
      hooks: of the run.
      info: result of the step.
      last: the last step of the run.
    """
    for hook in hooks:
        if info.step % hook.every == 0 or (hook.at_end and info.step == last):
            info = hook.call(info) or info
    return info
