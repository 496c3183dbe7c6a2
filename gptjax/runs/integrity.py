"""Whether a checkpoint is what was written: a digest of each of its files, and which of several to take.

Reads and writes bytes; knows nothing of arrays, and imports no jax.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from gptjax.core.files import write_atomic

NAME = "SHA256SUMS"  # in the checkpoint's folder, in the form that `sha256sum --check` reads
LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")


def seal(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Writes down the digests of the files in a folder; those that are written down already are not read again.

    Args:
      folder: a checkpoint's.
      leave_out: names of files that are still to change.
    """
    known = read(folder) if (folder / NAME).exists() else {}
    names = [name for name in files_in(folder) if name not in leave_out]
    digests = {name: known.get(name) or digest(folder / name) for name in names}
    write_atomic(folder / NAME, "".join(f"{digests[name]}  {name}\n" for name in names))


def problem(folder: Path, part: str = "", loose: Collection[str] = ()) -> str:
    """What is wrong with a checkpoint's files; "" if each is as it was written.

    Args:
      folder: the checkpoint's.
      part: looks only at the files below this folder in it.
      loose: names of files that need not be written down.
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
    # Some file systems leave hidden files beside the others.
    shown = [name for name in files_in(folder) if not Path(name).name.startswith(".")]
    unknown = [name for name in shown if name.startswith(prefix) and name not in digests and name not in loose]
    return f"{NAME} does not know {unknown[0]}" if unknown else ""


def choose(verdicts: Iterable[tuple[int, str]]) -> tuple[int | None, dict[int, str]]:
    """The first step with no problem, or None, and the problems of those before it; looks no further than it must.

    Args:
      verdicts: steps, the most wanted first, each with its problem or "".
    """
    problems: dict[int, str] = {}
    for step, found in verdicts:
        if not found:
            return step, problems
        problems[step] = found
    return None, problems


def files_in(folder: Path) -> list[str]:
    """Names of the files below a folder, sorted, but for the list of digests itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name != NAME and not name.startswith(f".{NAME}.")]


def read(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as `seal` wrote them.

    Raises:
      ValueError: it did not write this.
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
