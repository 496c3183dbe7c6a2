"""Checkpoints of a run, written asynchronously by orbax; each is complete or absent."""

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

RETRY_SECONDS = 10.0  # after a failed save; doubled after each further failure
LONGEST_RETRY_SECONDS = 600.0
LAST_SAVE_SECONDS = 600.0  # limit for retries of the last checkpoint of a run


@functools.cache
def silence_orbax() -> None:
    """Silences the logs of orbax's failures, which it also raises as exceptions.

    Orbax logs them with tracebacks, and asyncio logs or warns about the tasks that a failed save leaves behind.
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
    """The checkpoints in `workdir/checkpoints`, one folder per step, with items "params" and "rest".

    "params" are the evaluation parameters (gptjax.optim.eval_params), which are all that a reader needs; "rest" has the
    trained parameters if they differ, so that training resumes exactly. Digests of all files are written before a
    folder gets its final name, so a checkpoint without them is damaged.

    Args:
      workdir: a run's directory.
      keep: number of the newest to keep, for the one run that writes; None: read only.
      keep_every: also keeps the multiples of this number of steps; 0: none.
      keep_best: number of those with the lowest held-out loss that are also kept.
      clock: returns seconds since any fixed time.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int | None = None,
        keep_every: int = 0,
        keep_best: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        silence_orbax()
        self.directory = (workdir / "checkpoints").absolute()
        self.retention = None if keep is None else checkpoint_policy.Retention(keep, keep_every, keep_best)
        self.clock = clock
        self.retry_at: float | None = None  # time of the clock, if the newest save has failed
        self._failures = 0
        self._trouble = ""
        self._step = 0  # of the newest save
        self._loss: float | None = None
        self._writing = False
        self._open()

    def _open(self) -> None:
        self.losses = checkpoint_dir.losses(self.directory)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_policy.RetentionPolicy(self.retention, self.losses)
            if self.retention
            else None,
            read_only=self.retention is None,
            create=self.retention is not None,
            cleanup_tmp_directories=self.retention is not None,  # left by a killed run
            lightweight_initialize=True,  # reads no files, which may be damaged
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finalize),
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "rest"))

    # Listing.

    def latest(self) -> int | None:
        """Returns the newest step that has a checkpoint, damaged or not, or None."""
        return next(iter(checkpoint_dir.steps(self.directory)), None)

    def newest_usable(self) -> int | None:
        """Returns the newest step to resume from; see gptjax.runs.checkpoint_dir.newest_usable."""
        return checkpoint_dir.newest_usable(self.directory)

    def is_among_best(self, loss: float | None) -> bool:
        """Returns True if a held-out loss is low enough for its checkpoint to be kept as one of the best."""
        return loss is not None and self.retention is not None and self.retention.is_among_best(loss, self.losses)

    # Writing.

    def save(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Starts to write the state; returns once it is copied.

        If the file system fails, now or later, this is logged once, and `retry_at` is the time to save again.

        Args:
          step: of the state.
          state: to save.
          loss: on held-out text, if known.
        """
        self.wait()
        eval_params = optim.eval_params(state.opt_state, state.params)
        items = {"params": ocp.args.StandardSave(eval_params), "rest": ocp.args.StandardSave(_rest(state))}
        self._step, self._loss = step, loss
        try:
            if self._failures:  # the old manager counts the failed save, and has forgotten what it was to delete
                self._open()
            if loss is not None:
                self.losses[step] = loss
            self.manager.save(step, args=ocp.args.Composite(**items))
            self._writing = True
        except Exception as error:
            self._failed(error)

    def save_params(self, step: int, params: Any) -> None:
        """Writes only parameters: those that a run starts from."""
        self._step, self._loss = step, None
        self.manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        self.manager.wait_until_finished()
        self._seal()

    def poll(self) -> None:
        """Checks for the end of a save without waiting."""
        if self._writing and not self.manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress."""
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
            checkpoint_dir.remove_unfinished(self.directory)  # which threads of a failed save may have written since
        self._failures, self.retry_at = 0, None

    def finish(self, state: TrainState) -> None:
        """Waits for the last checkpoint; retries for LAST_SAVE_SECONDS if the file system fails.

        Args:
          state: the state that was saved last.

        Raises:
          CheckpointError: it still fails.
        """
        self.wait()
        deadline = self.clock() + LAST_SAVE_SECONDS
        if self.retry_at is not None:
            console.say(f"checkpoint {self._step} is the last one; retrying for {LAST_SAVE_SECONDS / 60:.0f} minutes")
        while self.retry_at is not None:
            if self.clock() >= deadline:
                raise CheckpointError(
                    f"{self._trouble} and run the same command again: checkpoint {self._step} could not be written, "
                    "older ones are complete"
                )
            time.sleep(RETRY_SECONDS)
            self.save(self._step, state, self._loss)
            self.wait()

    def _finalize(self) -> None:
        """Called by orbax's thread, in one process, before a checkpoint gets its final name."""
        checkpoint_dir.finalize(self.directory, self._step, self._loss)

    def _seal(self) -> None:
        """Adds the digests of the files that orbax wrote last; the checkpoint is valid without them."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                integrity.seal(self.directory / str(self._step))

    def _failed(self, error: Exception) -> None:
        # Threads of the previous save may still write into the folder that is removed for this one.
        left_behind = (errno.ENOTEMPTY, errno.EEXIST)
        is_repeated = self._failures and isinstance(error, OSError) and error.errno in left_behind
        self._trouble = disk_error(error) or (self._trouble if is_repeated else "")
        if not self._trouble:
            raise error
        if not self._failures:
            console.say(
                f"checkpoint {self._step} cannot be written: {self._trouble}; the run continues and tries again"
            )
        self.retry_at = self.clock() + min(RETRY_SECONDS * 2**self._failures, LONGEST_RETRY_SECONDS)
        self._failures += 1
        self.losses.pop(self._step, None)
        with contextlib.suppress(Exception):
            self.manager.close()
        checkpoint_dir.remove_unfinished(self.directory)

    # Reading.

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Restores a state.

        Args:
          like: a state, or its shapes with shardings.
          step: from `newest_usable`; None: the newest usable one.

        Raises:
          CheckpointError: there is none, all are damaged, or it belongs to another model.
        """
        items = {"rest": ocp.args.StandardRestore(_rest(like))}
        if not optim.has_eval_params(like.opt_state):
            items["params"] = ocp.args.StandardRestore(like.params)
        if step is None:
            step = checkpoint_dir.first_intact(self.directory, checkpoint_dir.candidate_steps(self.directory, None))
        restored = self._restore(step, **items)
        return like.replace(**restored["rest"] | ({"params": restored["params"]} if "params" in items else {}))

    def restore_params(self, like: Any, step: int | str | None = None) -> Any:
        """Restores only the parameters, even if the rest of the checkpoint is damaged; raises the errors of `restore`.

        Args:
          like: their shapes with shardings.
          step: of the checkpoint; "best": the one with the lowest held-out loss; None: the newest.
        """
        while True:
            available = checkpoint_dir.steps(self.directory)
            candidates = checkpoint_dir.candidate_steps(self.directory, step)
            intact = checkpoint_dir.first_intact(self.directory, candidates, "params")
            try:
                return self._restore(intact, params=ocp.args.StandardRestore(like))["params"]
            except CheckpointError:
                if checkpoint_dir.steps(self.directory) == available:
                    raise  # otherwise the run that writes may have deleted it in the meantime

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many types for one cause
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} belongs to another model or cannot be read "
                f"({type(error).__name__}: {first})"
            ) from error

    def quarantine_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, which are damaged, so that a resumed run can write its own."""
        if (self.latest() or 0) > step:
            processes.run_on_first(
                lambda: checkpoint_dir.quarantine_after(self.directory, step), "later checkpoints are quarantined"
            )
            self._open()

    def newest_before(self, step: int) -> int | None:
        """Returns the newest step before `step` with an intact checkpoint, or None; step 0 does not count.

        Raises:
          CheckpointError: all checkpoints before it are damaged.
        """
        self.wait()
        earlier = [saved for saved in checkpoint_dir.steps(self.directory) if 0 < saved < step]
        return checkpoint_dir.first_intact(self.directory, earlier) if earlier else None

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints after a step, for a run that continues differently from there."""
        self.wait()
        processes.run_on_first(
            lambda: checkpoint_dir.remove_after(self.directory, step), "later checkpoints are deleted"
        )
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
            if kind is None:  # otherwise the first error is the one to report
                raise


def _rest(state: TrainState) -> dict[str, Any]:
    """The fields of the state that are not in the item "params"."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del rest["frozen"]  # another run has it
    if not optim.has_eval_params(state.opt_state):
        del rest["params"]
    return rest


def shapes_on(tree: Any, shardings: Any) -> Any:
    """Returns the shapes and dtypes of a tree with shardings.

    Args:
      tree: arrays or shapes.
      shardings: one for all leaves, or a tree with one per leaf.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings)
