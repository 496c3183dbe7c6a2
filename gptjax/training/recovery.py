"""Recovery from bad steps on the host: logs them, rolls back to a checkpoint once, then stops with a report.

Many bad steps in a row mean that the batches are bad or that the parameters have become so. The run rolls back to the
newest checkpoint before them and leaves out their batches and those of as many steps before (as arXiv 2204.02311
section 5.1 does): training is deterministic, so leaving out only the skipped batches would lead to the same parameters
again. Left-out steps keep their numbers, so that a batch stays a function of the step, and change nothing, including
the optimizer's count and thus the schedule; data.json records them. gptjax.optim.skip_step decides which steps are bad.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import sharding
from gptjax.config.errors import Diverged
from gptjax.core import console, rng
from gptjax.core.files import write_atomic
from gptjax.data.tokenizers.specials import decode_with_specials
from gptjax.objectives import normalize_weights
from gptjax.optim import skip_step as guards
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import TrainState
from gptjax.sharding import processes
from gptjax.training import nonfinite
from gptjax.training.setup import TrainSetup
from gptjax.training.step import gradients, uses_dropout

REPORT = "diverged.json"
LOSSES = 100  # number of the newest losses in the report
ROWS, CHARACTERS = 4, 200  # of the text of a batch in the report


GOOD, SKIPPED, LEFT_OUT = "good", "skipped", "left out"


class BadStep(NamedTuple):
    """A bad step, which changed nothing."""

    step: int
    loss: float
    grad_norm: float
    why: str


class RepeatedBadSteps(Exception):
    """Raised after `guard.patience` bad steps in a row.

    Attributes:
      first, last: the first and the last bad step.
      worst: the first of them that this process saw.
      losses: by step, the newest last.
      state: after the bad steps; its parameters are those before each of them.
    """

    def __init__(self, first: int, last: int, worst: BadStep, losses: Mapping[int, float]) -> None:
        super().__init__(worst.why)
        self.first, self.last, self.worst, self.losses = first, last, worst, losses
        self.state: TrainState | None = None


class BadStepTracker:
    """Reads the metrics of each step, in order, and counts bad steps.

    Attributes:
      bad_in_a_row: number of consecutive bad steps up to now; left-out steps do not count.
      skipped: number of steps of the run so far that changed nothing.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.bad_in_a_row, self.skipped = patience, 0, 0
        self.first: BadStep | None = None
        self.losses: deque[tuple[int, float]] = deque(maxlen=LOSSES)

    def read(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Returns GOOD, SKIPPED or LEFT_OUT; logs the first bad step of a series, ever more rarely.

        Args:
          step: counted from 1.
          metrics: of the step, on the host.

        Raises:
          RepeatedBadSteps: `patience` steps in a row were bad.
        """
        self.bad_in_a_row, self.skipped = int(metrics["bad_in_a_row"]), int(metrics["skipped_steps"])
        if metrics["bad"] and not self.bad_in_a_row:
            return LEFT_OUT
        self.losses.append((step, float(metrics["loss"])))
        if not metrics["bad"]:
            self.first = None
            return GOOD
        if self.first is None:
            self.first = BadStep(
                step, float(metrics["loss"]), float(metrics["grad_norm"]), describe_bad_step(step, metrics)
            )
            if self.skipped & (self.skipped - 1) == 0:
                console.say(f"skipped    {self.first.why} ({self.skipped:,} skipped so far)")
        if self.bad_in_a_row >= self.patience:
            raise RepeatedBadSteps(step - self.bad_in_a_row + 1, step, self.first, dict(self.losses))
        return SKIPPED


def describe_bad_step(step: int, metrics: Mapping[str, Any]) -> str:
    """Describes what is bad about a step."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    by_loss = f"the loss at step {step} is {loss:.4g}"
    by_norm = f"{by_loss} and the norm of its gradient {norm:.4g}"
    if not math.isfinite(loss) or not math.isfinite(norm):
        return by_norm if math.isfinite(loss) else by_loss
    z = max(metrics["loss_z"], metrics["grad_norm_z"])
    return f"{by_loss if z == metrics['loss_z'] else by_norm}, {z:.1f} standard deviations above its mean"


@contextmanager
def attach_state(current: Callable[[], TrainState]) -> Iterator[None]:
    """Attaches the current state to a RepeatedBadSteps that leaves the block."""
    try:
        yield
    except RepeatedBadSteps as bad:
        bad.state = current()
        raise


def is_left_out(setup: TrainSetup, step: int) -> bool:
    """Returns True if the run leaves out the batch of a step."""
    return any(first <= step <= last for first, last in setup.left_out)


def skip_batch(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after a left-out step, and metrics like those of the train step."""
    state = _on_scalars(_count_skipped, state)
    skipped = int(state.guard.skipped)  # not the array, whose buffer is donated to the next step
    verdict = dict(zip(guards.METRICS, (True, 0, skipped, 0.0, 0.0), strict=True))
    return state, verdict | {"loss": math.nan, "grad_norm": math.nan}


def reset_statistics(setup: TrainSetup, state: TrainState, step: int) -> TrainState:
    """Returns the state before a step, with empty loss statistics where the shape or mixture of batches changes."""
    if step == 1 or step - 1 not in {phase.start for phase in setup.train_batches.phases}:
        return state
    return _on_scalars(_without_statistics, state)


def _count_skipped(state: TrainState) -> TrainState:
    guard = state.guard.replace(skipped=state.guard.skipped + 1, in_a_row=0 * state.guard.in_a_row)
    return state.replace(step=state.step + 1, guard=guard)


def _without_statistics(state: TrainState) -> TrainState:
    return state.replace(guard=guards.reset_statistics(state.guard))


def _on_scalars(change: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """Applies `change` to the step and the guard of a state, on their devices; the rest is not touched."""
    small = state.replace(params=None, frozen=None, opt_state=None)
    changed = jax.jit(change, out_shardings=state.step.sharding)(small)
    return changed.replace(params=state.params, frozen=state.frozen, opt_state=state.opt_state)


def roll_back(setup: TrainSetup, checkpoints: Checkpoints, bad: RepeatedBadSteps) -> TrainSetup:
    """Returns the set-up that resumes from the newest checkpoint before the bad steps; deletes later checkpoints.

    Frees the state of `bad`.

    Raises:
      Diverged: the run has rolled back before, or there is no checkpoint to roll back to; the report is written.
    """
    checkpoints.wait()  # in all processes, before the first one lists the checkpoints
    saved = processes.broadcast(lambda: checkpoints.newest_before(bad.first) or 0)
    if setup.left_out or not saved:
        raise Diverged(report_divergence(setup, bad))
    first = max(saved + 1, bad.first - (bad.last - bad.first + 1))
    # In this order: a run that is killed in between meets the same bad steps again.
    checkpoints.delete_after(saved)
    processes.run_on_first(lambda: workdirs.leave_out(setup.workdir, first, bad.last), "the left-out steps are written")
    console.say(
        f"rolling back to step {saved:,}: {bad}, and steps {bad.first:,} to {bad.last:,} were all skipped; "
        f"the batches of steps {first:,} to {bad.last:,} are left out"
    )
    jax.tree.map(lambda leaf: leaf.delete(), bad.state)  # frees memory for the restored state
    if setup.clock.marked and setup.clock.marked[0] == saved:
        setup.clock.lose(setup.clock.marked[1], setup.clock.reading())
    return setup._replace(left_out=workdirs.left_out(setup.workdir), resumes_at=saved)


def report_divergence(setup: TrainSetup, bad: RepeatedBadSteps) -> str:
    """Writes the report; returns the reason why training ends, in one line."""
    finding = first_nonfinite(setup, bad)
    batch = setup.train_batches[bad.worst.step - 1]
    facts = {
        "why": str(bad),
        "step": bad.worst.step,
        "loss": _or_null(bad.worst.loss),
        "grad_norm": _or_null(bad.worst.grad_norm),
        "bad_steps": [bad.first, bad.last],
        "left_out": setup.left_out,
        "first_nonfinite": {"what": finding.what, "where": finding.where},
        "batch": describe_batch(setup, batch["inputs_BT"]),
        "losses": {step: _or_null(loss) for step, loss in bad.losses.items()},
    }
    path = setup.workdir / REPORT
    if processes.is_first():
        write_atomic(path, json.dumps(facts, indent=2) + "\n")
    earlier = [f"although steps {first:,} to {last:,} were left out" for first, last in setup.left_out]
    return (
        f"training diverged: {bad}, and steps {bad.first:,} to {bad.last:,} were all skipped, "
        f"{earlier[0] if earlier else 'before the first checkpoint'}; {finding}; {path} shows the batch of step "
        f"{bad.worst.step:,}; try a lower learning rate, or other text"
    )


def first_nonfinite(setup: TrainSetup, bad: RepeatedBadSteps) -> nonfinite.Finding:
    """Locates the first non-finite number of the worst step, with its own batch and dropout."""
    assert bad.state is not None
    c, index = setup.config, bad.worst.step - 1
    batch = setup.teacher_fn(sharding.place_batch(setup.train_batches[index], setup.mesh, *setup.train_batches.share))
    dropout_key = rng.key(c.seed, "dropout", index) if uses_dropout(c) else None

    def gradient(params: Any, batch: Any) -> Any:
        return gradients(
            setup.objective, params, normalize_weights(batch), dropout_key, c.train.grad_accumulation, setup.mesh
        )[1]

    try:
        return nonfinite.find_first(c, bad.state.eval_params(), batch, dropout_key, gradient)
    except Exception as error:  # such as out of memory; the rest of the report is still useful
        return nonfinite.Finding("not known", f"{type(error).__name__}: {str(error)[:200]}")


def describe_batch(setup: TrainSetup, inputs_BT: np.ndarray) -> dict[str, Any]:
    """Describes a batch: shape, digest and the start of its text; with several processes, of this one's rows."""
    rows = [decode_with_specials(setup.data.tokenizer, row.ravel().tolist())[:CHARACTERS] for row in inputs_BT[:ROWS]]
    return {
        "shape": list(inputs_BT.shape),
        "inputs_sha256": hashlib.sha256(np.ascontiguousarray(inputs_BT).tobytes()).hexdigest(),
        "rows_begin": rows,
    }


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None
