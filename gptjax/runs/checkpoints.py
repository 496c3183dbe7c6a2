"""Checkpoints of a run, written while training goes on (orbax), each whole or absent. Nothing here decides when."""

import contextlib
import dataclasses
import errno
import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import optim
from gptjax.config.errors import CheckpointError
from gptjax.core import console
from gptjax.core.files import disk_error
from gptjax.runs import checkpoint_dir, checkpoint_policy, integrity
from gptjax.runs.train_state import TrainState
from gptjax.sharding import processes

RETRY_SECONDS = 10.0  # after a save that failed; twice as long after each further one
LONGEST_RETRY_SECONDS = 600.0
LAST_SAVE_SECONDS = 600.0  # how long the last checkpoint of a run is tried for


@functools.cache
def keep_orbax_quiet() -> None:
    """Lets orbax's failures reach a person once, as the exception that it raises.

    It logs each one as well, with tracebacks; the tasks it leaves behind are logged by asyncio, or find their event
    loop closed, or are warned of because they never began.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not any(
            end in str(unraisable.exc_value) for end in ("Event loop is closed", "Python is likely shutting down")
        ):
            previous(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, one folder a step, parameters apart from the rest.

    "params" are those that answer (see gptjax.optim.answering), which is all that a reader needs; the rest holds the
    trained ones where those are others, so that training goes on exactly. Digests of all files are written before a
    folder gets its name, so a checkpoint without them is damaged.

    Args:
      workdir: a run's directory.
      keep: how many of the newest to keep, for the one run that writes; None for those that only read.
      keep_every: checkpoints at its multiples, in steps, stay as well; 0: none.
      keep_best: how many of those with the least held-out loss stay as well.
      clock: seconds, from any start.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int | None = None,
        keep_every: int = 0,
        keep_best: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        keep_orbax_quiet()
        self.directory = (workdir / "checkpoints").absolute()
        self.keep = None if keep is None else checkpoint_policy.Retention(keep, keep_every, keep_best)
        self.clock = clock
        self.retry_at: float | None = None  # by the clock, where the newest save has failed
        self._failures = 0
        self._trouble = ""
        self._step = 0  # of the newest save
        self._loss: float | None = None
        self._writing = False
        self._open()

    def _open(self) -> None:
        self.losses = checkpoint_dir.losses(self.directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_policy.RetentionPolicy(self.keep, self.losses) if self.keep else None,
            read_only=self.keep is None,
            create=self.keep is not None,
            cleanup_tmp_directories=self.keep is not None,  # what a killed run had begun to write
            lightweight_initialize=True,  # reads no file of a checkpoint, which may be damaged
            async_options=ocp.AsyncOptions(post_finalization_callback=self._complete),
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "rest"))

    # What there is.

    def latest(self) -> int | None:
        """The newest step that has a checkpoint, damaged or not, or None."""
        return next(iter(checkpoint_dir.steps(self.directory)), None)

    def newest_usable(self) -> int | None:
        """As gptjax.runs.checkpoint_dir.newest_usable."""
        return checkpoint_dir.newest_usable(self.directory)

    def is_among_best(self, loss: float | None) -> bool:
        """Whether a held-out loss is worth a checkpoint."""
        return loss is not None and self.keep is not None and self.keep.is_among_best(loss, self.losses)

    # Writing.

    def save(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Begins to write the state; returns once it is copied.

        Where the file system fails, now or later, that is said once, and `retry_at` tells when to save again.

        Args:
          step: the state's.
          state: to save.
          loss: on held-out text, where it is known.
        """
        self.wait()
        eval_params = optim.eval_params(state.opt_state, state.params)
        items = {"params": ocp.args.StandardSave(eval_params), "rest": ocp.args.StandardSave(_rest(state))}
        self._step, self._loss = step, loss
        try:
            if self._failures:  # the old manager counts what has failed, and has forgotten what was to go in its stead
                self._open()
            if loss is not None:
                self.losses[step] = loss
            self.manager.save(step, args=ocp.args.Composite(**items))
            self._writing = True
        except Exception as error:
            self._failed(error)

    def save_params(self, step: int, params: Any) -> None:
        """Writes parameters alone: those that a run begins with."""
        self._step, self._loss = step, None
        self.manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        self.manager.wait_until_finished()
        self._seal()

    def poll(self) -> None:
        """Takes note of a save that has ended; waits for none."""
        if self._writing and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for what is being written."""
        if not self._writing:
            return
        self._writing = False
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return
        self._seal()
        if self._failures:
            console.say(f"checkpoint {self._step} is written")
            checkpoint_dir.remove_unfinished(self.directory)  # what threads of a failed save have written since
        self._failures, self.retry_at = 0, None

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint; where the file system fails it is tried again for LAST_SAVE_SECONDS.

        Args:
          state: as it was saved last.

        Raises:
          CheckpointError: it fails still.
        """
        self.wait()
        deadline = self.clock() + LAST_SAVE_SECONDS
        if self.retry_at is not None:
            console.say(
                f"checkpoint {self._step} is the last one; it is tried for {LAST_SAVE_SECONDS / 60:.0f} minutes"
            )
        while self.retry_at is not None:
            if self.clock() >= deadline:
                raise CheckpointError(
                    f"{self._trouble} and run the same command again: checkpoint {self._step} could not be written, "
                    "older ones are whole"
                )
            time.sleep(RETRY_SECONDS)
            self.save(self._step, state, self._loss)
            self.wait()

    def _complete(self) -> None:
        """Called by orbax's thread, in one process, before a checkpoint gets its name."""
        checkpoint_dir.complete(self.directory, self._step, self._loss)

    def _seal(self) -> None:
        """Adds the digests of what orbax has written last; where that fails the others are there."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                integrity.seal(self.directory / str(self._step))

    def _failed(self, error: Exception) -> None:
        # Threads of the save before may still be writing into what is cleared away for this one.
        still = self._failures and isinstance(error, OSError) and error.errno == errno.ENOTEMPTY
        self._trouble = disk_error(error) or (self._trouble if still else "")
        if not self._trouble:
            raise error
        if not self._failures:
            console.say(f"checkpoint {self._step} cannot be written: {self._trouble}; the run goes on and tries again")
        self.retry_at = self.clock() + min(RETRY_SECONDS * 2**self._failures, LONGEST_RETRY_SECONDS)
        self._failures += 1
        self.losses.pop(self._step, None)
        with contextlib.suppress(Exception):
            self.manager.close()
        checkpoint_dir.remove_unfinished(self.directory)

    # Reading.

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """A state.

        Args:
          like: a state, or its shapes with shardings, that says what to expect and where to put it.
          step: as `newest_usable` gave it; None: the newest usable one.

        Raises:
          CheckpointError: there is none, all are damaged, or it is another model's.
        """
        wanted = {"rest": ocp.args.StandardRestore(_rest(like))}
        if not optim.answers_elsewhere(like.opt_state):
            wanted["params"] = ocp.args.StandardRestore(like.params)
        if step is None:
            step = checkpoint_dir.first_whole(self.directory, checkpoint_dir.wanted(self.directory, None))
        items = self._restore(step, **wanted)
        return like.replace(**items["rest"] | ({"params": items["params"]} if "params" in wanted else {}))

    def restore_params(self, like: Any, step: int | str | None = None) -> Any:
        """Parameters alone, whatever else of the checkpoint is damaged; errors as of `restore`.

        Args:
          like: their shapes with shardings.
          step: whose; "best": of the least held-out loss; None: the newest.
        """
        while True:
            there = checkpoint_dir.steps(self.directory)
            found = checkpoint_dir.first_whole(self.directory, checkpoint_dir.wanted(self.directory, step), "params")
            try:
                return self._restore(found, params=ocp.args.StandardRestore(like))["params"]
            except CheckpointError:
                if checkpoint_dir.steps(self.directory) == there:
                    raise  # else the run that writes may have deleted it meanwhile

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds for one cause
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} is of another model or cannot be read "
                f"({type(error).__name__}: {first})"
            ) from error

    def set_aside_after(self, step: int) -> None:
        """Gives the checkpoints of later steps, which are damaged, other names; a run that goes on writes its own."""
        if (self.latest() or 0) > step:
            processes.first_does(
                lambda: checkpoint_dir.set_aside_after(self.directory, step), "later checkpoints are aside"
            )
            self._open()

    def newest_before(self, step: int) -> int | None:
        """The newest state saved before a step that is whole, or None; parameters that a run began with are none.

        Raises:
          CheckpointError: there are some, and each is damaged.
        """
        self.wait()
        earlier = [saved for saved in checkpoint_dir.steps(self.directory) if 0 < saved < step]
        return checkpoint_dir.first_whole(self.directory, earlier) if earlier else None

    def drop_after(self, step: int) -> None:
        """Deletes what was saved after a step, for a run that goes another way from there."""
        self.wait()
        processes.first_does(lambda: checkpoint_dir.remove_after(self.directory, step), "later checkpoints are gone")
        self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
            if self.retry_at is not None:
                raise CheckpointError(f"{self._trouble}: checkpoint {self._step} could not be written")
            self.manager.close()
        except Exception:
            if kind is None:  # else the first error is the one to tell of
                raise


def _rest(state: TrainState) -> dict[str, Any]:
    """All of the state but what lies in "params"."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del rest["frozen"]  # as another run has it
    if not optim.answers_elsewhere(state.opt_state):
        del rest["params"]
    return rest


def shapes_on(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and dtypes, with where each leaf is to lie.

    Args:
      tree: arrays or shapes.
      shardings: one for all, or a tree of one for each.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)
    return jax.tree.map(lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), tree, shardings)
