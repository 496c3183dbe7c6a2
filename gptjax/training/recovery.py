"""What the host does about bad steps: tells of them, goes back to a checkpoint once, and then stops with a report.

Bad steps in a row mean that the batches are bad or that the parameters have become so. The run goes back to the newest
checkpoint from before them and leaves out their batches, and those of as many steps before (as arXiv 2204.02311 section
5.1 does): the way there is exact, and to leave out only what was skipped would lead to the same parameters again.
Left-out steps keep their numbers, so that a batch stays a function of the step, and change nothing, the optimizer's
count and with it the schedule included; data.json says which they are. gptjax.optim.skip_step decides what is bad.
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
from gptjax.training.step import drops_out, gradients

REPORT = "diverged.json"
LOSSES = 100  # newest ones in the report
ROWS, CHARACTERS = 4, 200  # of a batch's text in the report


GOOD, SKIPPED, LEFT_OUT = "good", "skipped", "left out"


class BadStep(NamedTuple):
    """A step that changed nothing."""

    step: int
    loss: float
    grad_norm: float
    why: str


class BadRun(Exception):
    """As many bad steps in a row as `guard.patience` allows.

    Attributes:
      first, last: the steps.
      worst: the first of them that this process saw.
      losses: by step, the newest last.
      state: what they left behind; its parameters are those that each of them met.
    """

    def __init__(self, first: int, last: int, worst: BadStep, losses: Mapping[int, float]) -> None:
        super().__init__(worst.why)
        self.first, self.last, self.worst, self.losses = first, last, worst, losses
        self.state: TrainState | None = None


class Verdicts:
    """Reads what the device said of each step, in order.

    Attributes:
      bad_in_a_row: newest steps that were bad, one after the other; left-out ones do not count.
      skipped: steps of the run so far that changed nothing.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.bad_in_a_row, self.skipped = patience, 0, 0
        self.first: BadStep | None = None
        self.losses: deque[tuple[int, float]] = deque(maxlen=LOSSES)

    def read(self, step: int, said: Mapping[str, Any]) -> str:
        """GOOD, SKIPPED or LEFT_OUT. Tells of the first bad step of those in a row, ever more rarely.

        Args:
          step: counted from 1.
          said: its metrics, on the host.

        Raises:
          BadRun: the patience is at its end.
        """
        self.bad_in_a_row, self.skipped = int(said["bad_in_a_row"]), int(said["skipped_steps"])
        if said["bad"] and not self.bad_in_a_row:
            return LEFT_OUT
        self.losses.append((step, float(said["loss"])))
        if not said["bad"]:
            self.first = None
            return GOOD
        if self.first is None:
            self.first = BadStep(step, float(said["loss"]), float(said["grad_norm"]), why(step, said))
            if self.skipped & (self.skipped - 1) == 0:
                console.say(f"skipped    {self.first.why} ({self.skipped:,} skipped so far)")
        if self.bad_in_a_row >= self.patience:
            raise BadRun(step - self.bad_in_a_row + 1, step, self.first, dict(self.losses))
        return SKIPPED


def why(step: int, said: Mapping[str, Any]) -> str:
    """What is bad about a step, in words."""
    loss, norm = float(said["loss"]), float(said["grad_norm"])
    by_loss = f"the loss at step {step} is {loss:.4g}"
    by_norm = f"{by_loss} and the norm of its gradient {norm:.4g}"
    if not math.isfinite(loss) or not math.isfinite(norm):
        return by_norm if math.isfinite(loss) else by_loss
    z = max(said["loss_z"], said["grad_norm_z"])
    return f"{by_loss if z == said['loss_z'] else by_norm}, {z:.1f} standard deviations above its mean"


@contextmanager
def with_state(current: Callable[[], TrainState]) -> Iterator[None]:
    """Gives a BadRun that leaves the block the state that there is then."""
    try:
        yield
    except BadRun as bad:
        bad.state = current()
        raise


def is_left_out(job: TrainSetup, step: int) -> bool:
    """Whether the run does not train on the batch of a step."""
    return any(first <= step <= last for first, last in job.left_out)


def passed_over(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state after a left-out step, and metrics as the train step's."""
    state = _on_scalars(_counted, state)
    skipped = int(state.guard.skipped)  # not the array, whose memory the next step takes
    said = dict(zip(guards.METRICS, (True, 0, skipped, 0.0, 0.0), strict=True))
    return state, said | {"loss": math.nan, "grad_norm": math.nan}


def entering(job: TrainSetup, state: TrainState, step: int) -> TrainState:
    """The state before a step, its statistics empty where a batch is of another shape or mixture than those before."""
    if step == 1 or step - 1 not in {phase.start for phase in job.train_batches.phases}:
        return state
    return _on_scalars(_begun_anew, state)


def _counted(state: TrainState) -> TrainState:
    guard = state.guard.replace(skipped=state.guard.skipped + 1, in_a_row=0 * state.guard.in_a_row)
    return state.replace(step=state.step + 1, guard=guard)


def _begun_anew(state: TrainState) -> TrainState:
    return state.replace(guard=guards.without_statistics(state.guard))


def _on_scalars(change: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """`change` of a state's step and guard, where they lie; the rest is not touched."""
    small = state.replace(params=None, frozen=None, opt_state=None)
    changed = jax.jit(change, out_shardings=state.step.sharding)(small)
    return changed.replace(params=state.params, frozen=state.frozen, opt_state=state.opt_state)


def go_back(job: TrainSetup, checkpoints: Checkpoints, bad: BadRun) -> TrainSetup:
    """The job as it goes on from the newest checkpoint before the bad steps, now the newest of all.

    Frees the state of `bad`.

    Raises:
      Diverged: the run has gone back before, or there is no checkpoint to go back to; the report is written then.
    """
    checkpoints.wait()  # all of them do, before the first one looks
    saved = processes.of_first(lambda: checkpoints.newest_before(bad.first) or 0)
    if job.left_out or not saved:
        raise Diverged(give_up(job, bad))
    first = max(saved + 1, bad.first - (bad.last - bad.first + 1))
    # In this order: killed in between, the run meets the same bad steps again.
    checkpoints.drop_after(saved)
    processes.first_does(lambda: workdirs.leave_out(job.workdir, first, bad.last), "it is written what is left out")
    console.say(
        f"going back to step {saved:,}: {bad}, and steps {bad.first:,} to {bad.last:,} were all skipped; "
        f"the batches of steps {first:,} to {bad.last:,} are left out"
    )
    jax.tree.map(lambda leaf: leaf.delete(), bad.state)  # the restored one needs its memory
    if job.clock.marked and job.clock.marked[0] == saved:
        job.clock.lose(job.clock.marked[1], job.clock.reading())
    return job._replace(left_out=workdirs.left_out(job.workdir), resumes_at=saved)


def give_up(job: TrainSetup, bad: BadRun) -> str:
    """Writes the report; why training ends, in one line."""
    found = first_nonfinite(job, bad)
    batch = job.train_batches[bad.worst.step - 1]
    facts = {
        "why": str(bad),
        "step": bad.worst.step,
        "loss": _or_null(bad.worst.loss),
        "grad_norm": _or_null(bad.worst.grad_norm),
        "bad_steps": [bad.first, bad.last],
        "left_out": job.left_out,
        "first_nonfinite": {"what": found.what, "where": found.where},
        "batch": of_batch(job, batch["inputs_BT"]),
        "losses": {step: _or_null(loss) for step, loss in bad.losses.items()},
    }
    path = job.workdir / REPORT
    if processes.is_first():
        write_atomic(path, json.dumps(facts, indent=2) + "\n")
    once = [f"although steps {first:,} to {last:,} were left out" for first, last in job.left_out]
    return (
        f"training diverged: {bad}, and steps {bad.first:,} to {bad.last:,} were all skipped, "
        f"{once[0] if once else 'before the first checkpoint'}; {found}; {path} shows the batch of step "
        f"{bad.worst.step:,}; try a lower learning rate, or other text"
    )


def first_nonfinite(job: TrainSetup, bad: BadRun) -> nonfinite.Finding:
    """Where numbers stop being finite in the worst step, with its own batch and dropout."""
    assert bad.state is not None
    c, index = job.config, bad.worst.step - 1
    batch = job.teach(sharding.place(job.train_batches[index], job.mesh, *job.train_batches.share))
    dropout_key = rng.key(c.seed, "dropout", index) if drops_out(c) else None

    def gradient(params: Any, batch: Any) -> Any:
        return gradients(
            job.objective, params, normalize_weights(batch), dropout_key, c.train.grad_accumulation, job.mesh
        )[1]

    try:
        return nonfinite.first(c, bad.state.eval_params(), batch, dropout_key, gradient)
    except Exception as error:  # such as for want of memory: the rest of the report is worth having without it
        return nonfinite.Finding("not known", f"{type(error).__name__}: {str(error)[:200]}")


def of_batch(job: TrainSetup, inputs_BT: np.ndarray) -> dict[str, Any]:
    """What tells a batch from others, for a program and for a person; of several processes, this one's rows."""
    rows = [decode_with_specials(job.data.tokenizer, row.ravel().tolist())[:CHARACTERS] for row in inputs_BT[:ROWS]]
    return {
        "shape": list(inputs_BT.shape),
        "inputs_sha256": hashlib.sha256(np.ascontiguousarray(inputs_BT).tobytes()).hexdigest(),
        "rows_begin": rows,
    }


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None
