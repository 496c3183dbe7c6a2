"""The recorders of a population's members, as one: numbers of all members in, a line of metrics each out.

Also knows which members still learn: one whose steps were bad too often in a row has no lines from then on.
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
from gptjax.training.recovery import BadRun
from gptjax.training.setup import TrainSetup

OnMembersLine = Callable[[int, Line], None]


def of_member(tree: Any, member: int) -> Any:
    """One member's part of what all have, [M, ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


class Recorders:
    """A gptjax.training.monitoring.recorder.Recorder for each member, one step behind as that is.

    A context: leaving it closes the writers.
    """

    def __init__(
        self, jobs: Sequence[TrainSetup], states: TrainState, advance: Callable[..., None], on_line: OnMembersLine
    ) -> None:
        self.jobs, self.advance = jobs, advance
        self.alive = [True] * len(jobs)
        self.each = [
            Recorder(job, of_member(states, m), _one_of(m, advance), partial(on_line, m)) for m, job in enumerate(jobs)
        ]
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def __enter__(self) -> "Recorders":
        self._stack = ExitStack()
        for recorder in self.each:
            self._stack.enter_context(recorder)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def push(self, step: int, said: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, [M] each, which the devices may still be computing."""
        self.pending = step, said

    def take(self, due: bool = False) -> list[Line]:
        """Waits for the step that was pushed; the members' lines, empty where none is due.

        `due`: whether to make them even if `log.every_steps` asks for none.
        """
        if self.pending is None:
            return [{} for _ in self.jobs]
        (step, pending), self.pending = self.pending, None
        said = jax.device_get(pending)
        lines = [self._line(m, step, of_member(said, m), due) if self.alive[m] else {} for m in range(len(self.jobs))]
        losses = np.array([recorder.smooth_loss if self.alive[m] else math.inf for m, recorder in enumerate(self.each)])
        if any(self.alive):
            best = int(np.nanargmin(np.where(np.isnan(losses), math.inf, losses)))
            dead = {"diverged": f"{self.alive.count(False)}"} if not all(self.alive) else {}
            self.advance(0, best=f"{losses[best]:.3f} ({self.jobs[best].workdir.name})", **dead)
        return lines

    def goes_on_with(self, member: int, config: ConfigDict, source: int) -> None:
        """Has a member's lines tell of the learning rate of another config from now on, and of the state it took."""
        own, other = self.each[member], self.each[source]
        own.learning_rates = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.train.steps)))
        own.smooth_loss = other.smooth_loss
        self.alive[member] = self.alive[source]

    def _line(self, m: int, step: int, said: Mapping[str, Any], due: bool) -> Line:
        self.each[m].push(step, dict(said))
        try:
            with console.quiet() if m else nullcontext():  # what all members have to say the first one says
                return self.each[m].take(due)
        except BadRun as bad:
            self.alive[m] = False
            console.say(f"diverged   {self.jobs[m].workdir}: {bad}; it stays as it is, the others go on")
            return {}

    def write(self, lines: Sequence[Line], more: Sequence[Line] | None = None) -> None:
        """Hands each member's line to its writers, with more of its own, unless it is empty."""
        for recorder, line, own in zip(self.each, lines, more or [{}] * len(lines), strict=True):
            recorder.write(line | own if line else {})


def _one_of(member: int, advance: Callable[..., None]) -> Callable[..., None]:
    """What moves the bar of all members: the first one's steps do, and nothing else of a member's."""

    def moved(amount: float = 1, **facts: Any) -> None:
        if member == 0:
            advance(amount, **{name: fact for name, fact in facts.items() if name != "loss"})

    return moved
