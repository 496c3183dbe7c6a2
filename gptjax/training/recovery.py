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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import sharding
from gptjax.core import console, rng
from gptjax.core.files import write_atomic
from gptjax.data.tokenizers.specials import decode_with_specials
from gptjax.objectives import normalize_weights
from gptjax.optim import skip_step as guards
from gptjax.runs import directory as workdirs
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
    """

    def __init__(self, first: int, last: int, worst: BadStep, losses: Mapping[int, float]) -> None:
        super().__init__(worst.why)
        self.first, self.last, self.worst, self.losses = first, last, worst, losses


class RollBack(Exception):
    """Raised to resume from a checkpoint before bad steps.

    Attributes:
      member: whose steps were bad.
      steps: the bad steps.
      saved: step of the checkpoint.
      state: of all members, after the bad steps.
    """

    def __init__(self, member: int, steps: RepeatedBadSteps, saved: int, state: TrainState) -> None:
        super().__init__(str(steps))
        self.member, self.steps, self.saved, self.state = member, steps, saved, state


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


def is_left_out(setup: TrainSetup, step: int) -> bool:
    """Returns True if the run leaves out the batch of a step."""
    return any(first <= step <= last for first, last in setup.left_out)


def skip_batch(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after a left-out step, and metrics like those of the train step."""
    state = on_scalars(_count_skipped, state)
    return state, skipped_metrics(int(state.guard.skipped))  # not the array, whose buffer is donated to the next step


def skipped_metrics(skipped: Any) -> dict[str, Any]:
    """Returns metrics like those of the train step for a left-out step, of a run that has skipped so many steps."""
    verdict = dict(zip(guards.METRICS, (True, 0, skipped, 0.0, 0.0), strict=True))
    return verdict | {"loss": math.nan, "grad_norm": math.nan}


def skip_batch_if(
    is_left_out: jax.Array, old: TrainState, new: TrainState, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the result of a step, or what `skip_batch` returns if it is left out; for compiled programs.

    Args:
      is_left_out: boolean scalar.
      old: the state before the step.
      new, metrics: result of the step.
    """
    skipped = _count_skipped(old)
    state = jax.tree.map(lambda x, y: jnp.where(is_left_out, x, y), skipped, new)
    replaced = skipped_metrics(skipped.guard.skipped)
    return state, metrics | {name: jnp.where(is_left_out, x, metrics[name]) for name, x in replaced.items()}


def changes_batches(setup: TrainSetup, step: int) -> bool:
    """Returns True if shape or mixture of the batches changes at a step, so that loss statistics start anew."""
    return step > 1 and step - 1 in {phase.start for phase in setup.batches.train.phases}


def _count_skipped(state: TrainState) -> TrainState:
    guard = state.guard.replace(skipped=state.guard.skipped + 1, in_a_row=0 * state.guard.in_a_row)
    return state.replace(step=state.step + 1, guard=guard)


def without_statistics(state: TrainState) -> TrainState:
    """Returns a state with empty loss statistics."""
    return state.replace(guard=guards.reset_statistics(state.guard))


def on_scalars(change: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """Applies `change` to the step and the guard of a state, on their devices; the rest is not touched."""
    small = state.replace(params=None, frozen=None, opt_state=None)
    changed = jax.jit(change, out_shardings=state.step.sharding)(small)
    return changed.replace(params=state.params, frozen=state.frozen, opt_state=state.opt_state)


def leave_out(setup: TrainSetup, saved: int, bad: RepeatedBadSteps) -> TrainSetup:
    """Returns the set-up of a run that rolls back and leaves out the batches of its bad steps, which it records.

    Args:
      setup: of the run.
      saved: step of the checkpoint before the bad steps, from which the run resumes.
      bad: the bad steps.
    """
    first = max(saved + 1, bad.first - (bad.last - bad.first + 1))
    processes.run_on_first(lambda: workdirs.leave_out(setup.workdir, first, bad.last), "the left-out steps are written")
    console.say(
        f"rolling back to step {saved:,}: {bad}, and steps {bad.first:,} to {bad.last:,} were all skipped; "
        f"the batches of steps {first:,} to {bad.last:,} are left out"
    )
    return setup._replace(left_out=workdirs.left_out(setup.workdir))


def report_divergence(setup: TrainSetup, bad: RepeatedBadSteps, state: TrainState) -> str:
    """Writes the report; returns the reason why training ends, in one line.

    Args:
      setup: of the run.
      bad: its bad steps.
      state: after them; its parameters are those before each of them.
    """
    finding = first_nonfinite(setup, bad, state)
    batch = setup.batches.train[bad.worst.step - 1]
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


def first_nonfinite(setup: TrainSetup, bad: RepeatedBadSteps, state: TrainState) -> nonfinite.Finding:
    """Locates the first non-finite number of the worst step, with its own batch and dropout."""
    c, index = setup.config, bad.worst.step - 1
    parts, train = setup.parts, setup.batches.train
    batch = parts.teacher_fn(sharding.place_batch(train[index], parts.mesh, *train.share))
    dropout_key = rng.key(c.seed, "dropout", index) if uses_dropout(c) else None

    def gradient(params: Any, batch: Any) -> Any:
        return gradients(
            parts.objective, params, normalize_weights(batch), dropout_key, c.train.grad_accumulation, parts.mesh
        )[1]

    try:
        return nonfinite.find_first(c, state.eval_params(), batch, dropout_key, gradient)
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
