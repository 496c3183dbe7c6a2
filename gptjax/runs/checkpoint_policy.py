"""Policies of checkpoints: when to save, and which to keep. Nothing here writes or deletes."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class SaveSchedule:
    """Decides whether to save after a step: at multiples of steps, after some minutes, and at the last step.

    Args:
      settings: `config.checkpoint`.
      last: the last step of the run.
      clock: returns seconds since any fixed time.
    """

    def __init__(self, settings: ConfigDict, last: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.multiples = [every for every in (settings.every_steps, settings.keep_every) if every]
        self.seconds = 60 * settings.every_minutes or math.inf
        self.last, self.clock = last, clock
        self.restart()

    def restart(self) -> None:
        """Restarts the interval of minutes, after a save."""
        self.since = self.clock()

    def __call__(self, step: int, retry_at: float | None = None) -> bool:
        """Returns True if a checkpoint is due after `step`.

        Args:
          step: counted from 1.
          retry_at: after a failed save, the time of the clock at which to try again.
        """
        if step == self.last:
            return True
        if retry_at is not None:
            return self.clock() >= retry_at
        return any(step % every == 0 for every in self.multiples) or self.clock() - self.since >= self.seconds


class Retention(NamedTuple):
    """Selects the checkpoints to keep.

    Attributes:
      newest: number of the newest to keep.
      every: keeps the multiples of this number of steps; 0: none.
      best: number of those with the lowest held-out loss to keep.
    """

    newest: int
    every: int = 0
    best: int = 0

    def steps_to_keep(self, steps: Sequence[int], losses: Mapping[int, float]) -> set[int]:
        """Selects the steps to keep.

        Args:
          steps: of all checkpoints.
          losses: known held-out losses, by step.
        """
        periodic = {step for step in steps if self.every and step % self.every == 0}
        return set(sorted(steps)[-self.newest :]) | periodic | set(by_loss(steps, losses)[: self.best])

    def is_among_best(self, loss: float, losses: Mapping[int, float]) -> bool:
        """Returns True if a held-out loss is among the `best` lowest of these and itself."""
        if not math.isfinite(loss):
            return False
        return len(losses) < self.best or any(loss < other for other in sorted(losses.values())[: self.best])


def by_loss(steps: Sequence[int], losses: Mapping[int, float]) -> list[int]:
    """Sorts the steps with a known loss by loss, then by step."""
    return sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))


class RetentionPolicy:
    """A `Retention` as a preservation policy of orbax.

    Args:
      retention: selects the checkpoints.
      losses: held-out loss by step; the caller may add to it.
    """

    def __init__(self, retention: Retention, losses: Mapping[int, float]) -> None:
        self.retention, self.losses = retention, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for each checkpoint to keep."""
        steps = self.retention.steps_to_keep([checkpoint.step for checkpoint in checkpoints], self.losses)
        return [checkpoint.step in steps for checkpoint in checkpoints]
