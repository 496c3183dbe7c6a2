"""The folder of a run's checkpoints: lists them, chooses which to read, and quarantines damaged ones.

Uses only names and bytes; imports no jax, and reads no array.
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

UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a folder that is not complete
CHANGING = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these after the digests
LOSS = "loss.json"  # in a checkpoint: its held-out loss, if known


def steps(directory: Path) -> list[int]:
    """Lists the steps that have a checkpoint, damaged or not, newest first."""
    folders = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(folder.name) for folder in folders if folder.name.isdecimal()), reverse=True)


def losses(directory: Path) -> dict[int, float]:
    """Reads the held-out losses by step, of the checkpoints that have one."""
    by_step = {}
    for step in steps(directory):
        path = directory / str(step) / LOSS
        with contextlib.suppress(DataError):  # damage is reported when the checkpoint is read
            loss = parse_json(read_bytes(path), str(path), finite=False)
            schema.check(loss, float, str(path))
            by_step[step] = loss
    return by_step


def finalize(directory: Path, step: int, loss: float | None) -> None:
    """Adds gptjax's own files to a checkpoint that has all its arrays and not yet its final name."""
    unfinished = directory / f"{step}{UNFINISHED}"
    if loss is not None:
        (unfinished / LOSS).write_text(json.dumps(loss), encoding="utf-8")
    integrity.seal(unfinished, CHANGING)


def report_unfinished(directory: Path, after: int) -> None:
    """Logs checkpoints of later steps that were incomplete when the run was stopped."""
    for folder in sorted(directory.glob(f"*{UNFINISHED}*")):
        step = folder.name.split(".")[0]
        if step.isdecimal() and int(step) > after:
            console.say(f"checkpoint {step} is incomplete: the run was stopped while it was written")


def remove_unfinished(directory: Path) -> None:
    """Removes the incomplete folders of a failed save; no save may be in progress."""
    with contextlib.suppress(OSError):
        for folder in directory.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)


def remove_after(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps."""
    for later in steps(directory):
        if later > step:
            shutil.rmtree(directory / str(later))


def newest_usable(directory: Path) -> int | None:
    """Returns the newest step to resume from, or None if there is no checkpoint; logs newer ones that are damaged.

    Raises:
      CheckpointError: all checkpoints are damaged.
    """
    candidates = steps(directory)
    step = first_intact(directory, candidates) if candidates else None
    report_unfinished(directory, step or 0)
    return step


def candidate_steps(directory: Path, step: int | str | None) -> list[int]:
    """Lists the steps to try, in order of preference.

    Args:
      directory: of the checkpoints.
      step: "best": lowest held-out loss first; None: newest first; a number: only that step.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    available = steps(directory)
    if not available:
        raise CheckpointError(f"{directory} holds no checkpoint")
    if step is None:
        return available
    if step == "best":
        best = checkpoint_policy.by_loss(available, losses(directory))
        if not best:
            raise CheckpointError(f"no checkpoint in {directory} has a held-out loss; see checkpoint.keep_best")
        return best
    if step not in available:
        names = ", ".join(map(str, reversed(available)))
        raise CheckpointError(f"{directory} holds no checkpoint of step {step}; there are {names}")
    return [int(step)]


def first_intact(directory: Path, candidates: Sequence[int], part: str = "") -> int:
    """Returns the first step whose files match their digests; logs those before it, which are damaged.

    Args:
      directory: of the checkpoints.
      candidates: steps, in order of preference.
      part: checks only this subfolder of a checkpoint.

    Raises:
      CheckpointError: all candidates are damaged.
    """
    available = steps(directory)
    chosen, damaged = integrity.choose(
        (step, integrity.problem(directory / str(step), part, CHANGING)) for step in candidates
    )
    if damaged and steps(directory) != available:  # the run that writes has deleted some in the meantime
        left = [step for step in candidates if step in steps(directory)]
        return first_intact(directory, left or candidate_steps(directory, None), part)
    if chosen is None:
        each = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise CheckpointError(
            f"{directory} holds no usable checkpoint; damaged: {each}; "
            "restore a copy of one, or start again with another --workdir"
        )
    for step, problem in damaged.items():
        console.say(f"checkpoint {step} is damaged ({problem}); taking that of step {chosen}")
    return chosen


def quarantine_after(directory: Path, step: int) -> None:
    """Renames the checkpoints of later steps, which are damaged, so that a resumed run can write its own."""
    for later in [other for other in steps(directory) if other > step]:
        name = f"damaged-{later}"
        copies = sum(folder.name.split(".")[0] == name for folder in directory.iterdir())
        target = directory / (f"{name}.{copies + 1}" if copies else name)
        (directory / str(later)).rename(target)
        console.say(f"checkpoint {later} is quarantined as {target}; delete it if it is not needed")
