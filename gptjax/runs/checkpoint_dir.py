"""The folder of a run's checkpoints: which there are, which to take, and what becomes of damaged ones.

Looks at names and bytes alone; imports no jax, and reads no array.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from gptjax.config.errors import CheckpointError, DataError
from gptjax.core import console, schema
from gptjax.core.files import parse_json, read_bytes
from gptjax.runs import checkpoint_policy, integrity

UNFINISHED = ".orbax-checkpoint-tmp"  # what orbax adds to a folder's name until all is in it
CHANGING = ("_CHECKPOINT_METADATA", "commit_success.txt")  # what orbax writes after the digests, and no reader needs
LOSS = "loss.json"  # in a checkpoint: its held-out loss, where it is known


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, the newest first."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(folder.name) for folder in folders if folder.name.isdecimal()), reverse=True)


def losses(directory: Path) -> dict[int, float]:
    """Held-out loss by step, of the checkpoints that know theirs."""
    found = {}
    for step in steps(directory):
        path = directory / str(step) / LOSS
        with contextlib.suppress(DataError):  # damage is told of when the checkpoint is read
            loss = parse_json(read_bytes(path), str(path), finite=False)
            schema.check(loss, float, str(path))
            found[step] = loss
    return found


def finalize(directory: Path, step: int, loss: float | None) -> None:
    """Puts what is gptjax's own into a checkpoint that has all its arrays and not yet its name."""
    unfinished = directory / f"{step}{UNFINISHED}"
    if loss is not None:
        (unfinished / LOSS).write_text(json.dumps(loss), encoding="utf-8")
    integrity.seal(unfinished, CHANGING)


def report_unfinished(directory: Path, after: int) -> None:
    """Tells of checkpoints of later steps that a run had begun to write when it was stopped."""
    for folder in sorted(directory.glob(f"*{UNFINISHED}*")):
        step = folder.name.split(".")[0]
        if step.isdecimal() and int(step) > after:
            console.say(f"checkpoint {step} is half-written: the run was stopped before it was whole")


def remove_unfinished(directory: Path) -> None:
    """Removes what a save that failed has left; nothing may be being saved."""
    with contextlib.suppress(OSError):
        for folder in directory.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)


def remove_after(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for later in steps(directory):
        if later > step:
            shutil.rmtree(directory / str(later))


def newest_usable(directory: Path) -> int | None:
    """The newest step to go on from, None if there is no checkpoint at all; says which newer ones are damaged.

    Raises:
      CheckpointError: there are some, and each is damaged.
    """
    found = steps(directory)
    step = first_intact(directory, found) if found else None
    report_unfinished(directory, step or 0)
    return step


def candidate_steps(directory: Path, step: int | str | None) -> list[int]:
    """Steps to try, the most wanted first.

    Args:
      directory: the checkpoints'.
      step: "best": the least held-out loss first; None: the newest first; a step: none but that.

    Raises:
      CheckpointError: there is none such.
    """
    there = steps(directory)
    if not there:
        raise CheckpointError(f"{directory} holds no checkpoint")
    if step is None:
        return there
    if step == "best":
        best = checkpoint_policy.by_loss(there, losses(directory))
        if not best:
            raise CheckpointError(f"no checkpoint in {directory} has a held-out loss; see checkpoint.keep_best")
        return best
    if step not in there:
        names = ", ".join(map(str, reversed(there)))
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; there are {names}")
    return [int(step)]


def first_intact(directory: Path, candidates: Sequence[int], part: str = "") -> int:
    """The first of some steps whose files are as they were written; says which before it are not.

    Args:
      directory: the checkpoints'.
      candidates: steps, the most wanted first.
      part: looks at this folder of a checkpoint alone.

    Raises:
      CheckpointError: each is damaged.
    """
    there = steps(directory)
    chosen, damaged = integrity.choose(
        (step, integrity.problem(directory / str(step), part, CHANGING)) for step in candidates
    )
    if damaged and steps(directory) != there:  # the run that writes has deleted some meanwhile
        left = [step for step in candidates if step in steps(directory)]
        return first_intact(directory, left or candidate_steps(directory, None), part)
    if chosen is None:
        each = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise CheckpointError(
            f"{directory} holds no checkpoint that can be used; damaged are {each}; "
            "put back a copy of one, or begin anew with another --workdir"
        )
    for step, problem in damaged.items():
        console.say(f"checkpoint {step} is damaged ({problem}); taking that of step {chosen}")
    return chosen


def quarantine_after(directory: Path, step: int) -> None:
    """Gives the checkpoints of later steps, which are damaged, other names: a run that goes on writes its own."""
    for later in [other for other in steps(directory) if other > step]:
        name = f"damaged-{later}"
        copies = sum(folder.name.split(".")[0] == name for folder in directory.iterdir())
        target = directory / (f"{name}.{copies + 1}" if copies else name)
        (directory / str(later)).rename(target)
        console.say(f"checkpoint {later} is kept as {target}; delete it if nothing in it is to be saved")
