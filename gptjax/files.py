"""Writing a file or a folder whole or not at all, locks, and what to tell of a file system that fails."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it; on failure the old one stays."""
    raw = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# What a file system may get over, and what a person can do about it.
TROUBLES = {
    errno.ENOSPC: "no space left on the disk; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "the file would be larger than is allowed here; raise that limit (ulimit -f)",
    errno.EIO: "the disk has an input/output error; see to it",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.ESTALE: "the network file system has lost the file; mount it again",
}


def disk_trouble(error: BaseException | None) -> str:
    """What is wrong with the file system and what to do, wherever in the chain of causes it is; "" for anything else.

    tensorstore has the system's words in its messages and no error number.
    """
    while error is not None:
        for number, trouble in TROUBLES.items():
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
                return trouble
        error = error.__cause__ or error.__context__
    return ""


def is_free(folder: Path) -> bool:
    """Whether a folder can be made there: nothing is, or one that is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when the block ends well, and else is gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        os.chmod(unfinished, 0o755)
        yield unfinished
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Locks a file that exists while the block runs; yields whether it could: False, where another process has it.

    The lock ends with the process, however that ends.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
