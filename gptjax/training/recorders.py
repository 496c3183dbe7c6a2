"""The recorders of all members of a population: metrics of all members in, one line of metrics per member out.

Also tracks which members have diverged; those get no more lines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gptjax.core import console
from gptjax.optim import schedule
from gptjax.runs.train_state import TrainState
from gptjax.training.monitoring.recorder import Recorder
from gptjax.training.monitoring.writers import Line
from gptjax.training.recovery import RepeatedBadSteps
from gptjax.training.setup import TrainSetup

OnMemberLine = Callable[[int, Line], None]


def select_member(tree: Any, member: int) -> Any:
    """Selects one member of a tree of stacked arrays, [M, ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


class Recorders:
    """One gptjax.training.monitoring.recorder.Recorder per member, each one step behind the devices.

    A context manager: leaving it closes the writers.
    """

    def __init__(
        self, setups: Sequence[TrainSetup], states: TrainState, advance: Callable[..., None], on_line: OnMemberLine
    ) -> None:
        self.setups, self.advance = setups, advance
        self.alive = [True] * len(setups)
        self.each = [
            Recorder(setup, select_member(states, m), _one_of(m, advance), partial(on_line, m))
            for m, setup in enumerate(setups)
        ]
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def __enter__(self) -> "Recorders":
        self._stack = ExitStack()
        for recorder in self.each:
            self._stack.enter_context(recorder)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Stores the metrics of a step, [M] each, which the devices may still be computing."""
        self.pending = step, metrics

    def take(self, due: bool = False) -> list[Line]:
        """Waits for the pushed step; returns one line per member, empty where none is due.

        Args:
          due: makes a line even if `log.every_steps` asks for none.
        """
        if self.pending is None:
            return [{} for _ in self.setups]
        (step, pending), self.pending = self.pending, None
        metrics = jax.device_get(pending)
        lines = [
            self._line(m, step, select_member(metrics, m), due) if self.alive[m] else {}
            for m in range(len(self.setups))
        ]
        losses = np.array([recorder.smooth_loss if self.alive[m] else math.inf for m, recorder in enumerate(self.each)])
        if any(self.alive):
            best = int(np.nanargmin(np.where(np.isnan(losses), math.inf, losses)))
            dead = {"diverged": f"{self.alive.count(False)}"} if not all(self.alive) else {}
            self.advance(0, best=f"{losses[best]:.3f} ({self.setups[best].workdir.name})", **dead)
        return lines

    def inherit(self, member: int, config: ConfigDict, source: int) -> None:
        """Continues the lines of a member with the learning rates of `config` and the smoothed loss of `source`."""
        recorder, parent = self.each[member], self.each[source]
        recorder.learning_rates = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.train.steps)))
        recorder.smooth_loss = parent.smooth_loss
        self.alive[member] = self.alive[source]

    def _line(self, m: int, step: int, metrics: Mapping[str, Any], due: bool) -> Line:
        self.each[m].push(step, dict(metrics))
        try:
            with console.quiet() if m else nullcontext():  # the first member reports for all
                return self.each[m].take(due)
        except RepeatedBadSteps as bad:
            self.alive[m] = False
            console.say(f"diverged   {self.setups[m].workdir}: {bad}; it stops here, the other members continue")
            return {}

    def write(self, lines: Sequence[Line], more: Sequence[Line] | None = None) -> None:
        """Passes each line that is not empty to the writers of its member, with the metrics in `more`."""
        for recorder, line, extra in zip(self.each, lines, more or [{}] * len(lines), strict=True):
            recorder.write(line | extra if line else {})


def _one_of(member: int, advance: Callable[..., None]) -> Callable[..., None]:
    """Advances the shared progress bar by the steps of the first member only."""

    def advance_shared(amount: float = 1, **facts: Any) -> None:
        if member == 0:
            advance(amount, **{name: fact for name, fact in facts.items() if name != "loss"})

    return advance_shared
