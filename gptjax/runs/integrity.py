"""Integrity of checkpoints: digests of their files, and the choice of an undamaged one.

Reads and writes bytes; independent of arrays, and imports no jax.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from gptjax.core.files import write_atomic

NAME = "SHA256SUMS"  # in the checkpoint's folder, in the format of `sha256sum --check`
LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")


def seal(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Writes the digests of the files in a folder; files that have one are not read again.

    Args:
      folder: of a checkpoint.
      leave_out: names of files that may still change.
    """
    digests_before = read(folder) if (folder / NAME).exists() else {}
    names = [name for name in files_in(folder) if name not in leave_out]
    digests = {name: digests_before.get(name) or digest(folder / name) for name in names}
    write_atomic(folder / NAME, "".join(f"{digests[name]}  {name}\n" for name in names))


def problem(folder: Path, part: str = "", loose: Collection[str] = ()) -> str:
    """Describes the first problem of a checkpoint's files; "" if all match their digests.

    Args:
      folder: of the checkpoint.
      part: checks only the files below this subfolder.
      loose: names of files that need no digest.
    """
    try:
        digests = read(folder)
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError):
        return f"{NAME} is damaged"
    prefix = f"{part}/" if part else ""
    for name, expected in digests.items():
        if not name.startswith(prefix):
            continue
        try:
            if digest(folder / name) != expected:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    # Some file systems create hidden files.
    visible = [name for name in files_in(folder) if not Path(name).name.startswith(".")]
    unknown = [name for name in visible if name.startswith(prefix) and name not in digests and name not in loose]
    return f"{NAME} does not list {unknown[0]}" if unknown else ""


def choose(verdicts: Iterable[tuple[int, str]]) -> tuple[int | None, dict[int, str]]:
    """Returns the first step without a problem, or None, and the problems of those before it; stops as soon as it can.

    Args:
      verdicts: steps in order of preference, each with its problem or "".
    """
    problems: dict[int, str] = {}
    for step, verdict in verdicts:
        if not verdict:
            return step, problems
        problems[step] = verdict
    return None, problems


def files_in(folder: Path) -> list[str]:
    """Lists the names of the files below a folder, sorted, except the list of digests."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name != NAME and not name.startswith(f".{NAME}.")]


def read(folder: Path) -> dict[str, str]:
    """Reads the SHA-256 digests by file name, as written by `seal`.

    Raises:
      ValueError: an invalid line.
    """
    digests = {}
    for line in (folder / NAME).read_text(encoding="utf-8").splitlines(keepends=True):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(line)
        digests[match[2]] = match[1]
    return digests


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
