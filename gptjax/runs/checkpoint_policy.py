"""When a run saves, and which of its checkpoints stay. Decides; writes and deletes nothing."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class SaveSchedule:
    """Whether to save after a step: at its multiples, when the time has come, and always after the last.

    Args:
      settings: `config.checkpoint`.
      last: the run's last step.
      clock: seconds, from any start.
    """

    def __init__(self, settings: ConfigDict, last: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.multiples = [every for every in (settings.every_steps, settings.keep_every) if every]
        self.seconds = 60 * settings.every_minutes or math.inf
        self.last, self.clock = last, clock
        self.restart()

    def restart(self) -> None:
        """Something was saved just now."""
        self.since = self.clock()

    def __call__(self, step: int, retry_at: float | None = None) -> bool:
        """Whether to save after `step`.

        Args:
          step: counted from 1.
          retry_at: where a save has failed, when to try again, by the clock.
        """
        if step == self.last:
            return True
        if retry_at is not None:
            return self.clock() >= retry_at
        return any(step % every == 0 for every in self.multiples) or self.clock() - self.since >= self.seconds


class Retention(NamedTuple):
    """Which checkpoints stay.

    Attributes:
      newest: how many of the newest.
      every: those of its multiples, in steps; 0: none.
      best: how many of those with the least held-out loss.
    """

    newest: int
    every: int = 0
    best: int = 0

    def kept(self, steps: Sequence[int], losses: Mapping[int, float]) -> set[int]:
        """The steps that stay.

        Args:
          steps: all there are.
          losses: held-out loss by step, where it is known.
        """
        periodic = {step for step in steps if self.every and step % self.every == 0}
        return set(sorted(steps)[-self.newest :]) | periodic | set(by_loss(steps, losses)[: self.best])

    def is_among_best(self, loss: float, losses: Mapping[int, float]) -> bool:
        """Whether a held-out loss is worth a checkpoint, where those with `losses` are there."""
        if not math.isfinite(loss):
            return False
        return len(losses) < self.best or any(loss < other for other in sorted(losses.values())[: self.best])


def by_loss(steps: Sequence[int], losses: Mapping[int, float]) -> list[int]:
    """The steps whose loss is known, the least first; of equals the earlier."""
    return sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))


class RetentionPolicy:
    """A `Keep` as orbax's preservation policy.

    Args:
      keep: the decision.
      losses: held-out loss by step; the caller's own, which it adds to.
    """

    def __init__(self, keep: Retention, losses: Mapping[int, float]) -> None:
        self.keep, self.losses = keep, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each stays."""
        kept = self.keep.kept([checkpoint.step for checkpoint in checkpoints], self.losses)
        return [checkpoint.step in kept for checkpoint in checkpoints]
