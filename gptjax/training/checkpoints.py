"""Checkpoints of a run, written while training goes on (orbax), each whole or absent. Nothing here decides when."""

import dataclasses
import functools
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import optim
from gptjax.config import CheckpointError
from gptjax.training.state import TrainState


@functools.cache
def keep_orbax_quiet() -> None:
    """Lets orbax's failures reach a person once, as the exception that it raises.

    It logs each one as well, with tracebacks; the tasks it leaves behind are logged by asyncio, or find their event
    loop closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints in `workdir/checkpoints`, one folder a step, parameters apart from the rest.

    "params" are those that answer (see gptjax.optim.answering), which is all that a reader needs; the rest holds the
    trained ones where those are others, so that training goes on exactly.

    Args:
      workdir: a run's directory.
      keep: how many to keep, for the one process that writes; None for those that only read.
    """

    def __init__(self, workdir: Path, keep: int | None = None) -> None:
        keep_orbax_quiet()
        self.directory = (workdir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,  # what a killed run had begun to write
        )
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "rest"))

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write the state; returns once it is copied. A failure shows at the next save or at `wait`."""
        answering = optim.answering(state.opt_state, state.params)
        items = ocp.args.Composite(params=ocp.args.StandardSave(answering), rest=ocp.args.StandardSave(_rest(state)))
        self.manager.save(step, args=items)

    def save_params(self, step: int, params: Any) -> None:
        """Writes parameters alone: those that a run begins with."""
        self.manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        self.wait()

    def restore(self, like: TrainState) -> TrainState:
        """The newest state.

        Args:
          like: a state, or its shapes with shardings, that says what to expect and where to put it.

        Raises:
          CheckpointError: there is none, it is damaged, or it is another model's.
        """
        wanted = {"rest": ocp.args.StandardRestore(_rest(like))}
        if not optim.answers_elsewhere(like.opt_state):
            wanted["params"] = ocp.args.StandardRestore(like.params)
        items = self._restore(**wanted)
        return like.replace(**{"params": items.get("params")} | items["rest"])

    def restore_params(self, like: Any) -> Any:
        """The newest parameters alone; arguments and errors as of `restore`."""
        return self._restore(params=ocp.args.StandardRestore(like))["params"]

    def _restore(self, **items: Any) -> Any:
        step = self.latest()
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many kinds for one cause
            place = self.directory / str(step)
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise CheckpointError(
                f"the checkpoint {place} is damaged or of another model ({type(error).__name__}: {first}); "
                "delete that folder to go on from the one before it"
            ) from error

    def newest_before(self, step: int) -> int | None:
        """The newest state saved before a step, or None; parameters that a run began with, at 0, are none."""
        self.wait()
        return max((saved for saved in self.manager.all_steps() if 0 < saved < step), default=None)

    def drop_after(self, step: int) -> None:
        """Deletes what was saved after a step, for a run that goes another way from there."""
        self.wait()
        for saved in [saved for saved in self.manager.all_steps() if saved > step]:
            self.manager.delete(saved)

    def wait(self) -> None:
        """Waits for what is being written; raises what went wrong with it."""
        self.manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.manager.close()
        except Exception:
            if kind is None:  # else the first error is the one to tell of
                raise


def _rest(state: TrainState) -> dict[str, Any]:
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if not optim.answers_elsewhere(state.opt_state):
        del rest["params"]
    return rest


def shapes_on(state: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree's shapes and dtypes, with where each leaf is to lie."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
