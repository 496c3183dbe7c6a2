"""Reading text and JSON, writing a file or a folder whole or not at all, locks, and lines for a failing file system.

Every text file of gptjax is read and written as UTF-8, whatever the locale is: by these functions, or by an `open`
that names its encoding.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptjax.config.errors import DataError


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
      DataError: it is missing, cannot be read, or has no end.
    """
    check_ends(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def check_ends(path: Path) -> None:
    """Raises DataError for what could be read for ever: a named pipe, a socket or a device, but the null device.

    A pipe of this process, such as the shell's `<(...)`, has a writer and is let through.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise DataError(f"cannot read {str(path)!r}: a path has no zero byte") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    ours = str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or ours or os.path.samefile(path, os.devnull)):
        raise DataError(f"cannot read {path}: it is a pipe or a device, and no file")


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark, line ends as they are.

    Args:
      raw: bytes of a whole file.
      where: name of the file, for the message.

    Raises:
      DataError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line:,}") from error


def decode_repaired(raw: bytes) -> tuple[str, bool]:
    """UTF-8 text in which bytes that are no UTF-8 are U+FFFD, and whether there were any; for records among many."""
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace"), True


def repair(text: str) -> str:
    """The same text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot write.

    Such halves come from JSON's escapes, and from arguments of the command line that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_text(path: Path) -> str:
    """Text of a UTF-8 file without its byte order mark, line ends as they are.

    Raises:
      DataError: it is missing, cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(path), str(path))


# How many arrays and objects may stand within each other: what parsers take differs between versions of Python.
DEEPEST = 500
_NESTING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|([\[{])|[\]}]', re.DOTALL)


def is_too_deep(text: str) -> bool:
    """Whether a JSON text has more than DEEPEST arrays and objects within each other."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    depth = 0
    for match in _NESTING.finditer(text):
        if text[match.start()] != '"':
            depth += 1 if match[1] else -1
            if depth > DEEPEST:
                return True
    return False


def parse_json(text: str | bytes, where: str, finite: bool = True) -> Any:
    """Value of a JSON text.

    Args:
      text: whole; bytes are UTF-8, with or without a byte order mark.
      where: file, and line or record where there are several, for the message.
      finite: whether NaN and infinity, which JSON does not have but Python writes, are refused.

    Raises:
      DataError: it is not JSON, it is nested too deeply, or it has a number that is not finite.
    """

    def number(literal: str) -> float:
        value = float(literal)
        if finite and not math.isfinite(value):
            raise DataError(f"{where} has the number {literal[:40]}, which is not finite")
        return value

    text = decode(text, where) if isinstance(text, bytes) else text
    if is_too_deep(text):
        raise DataError(f"{where} is nested too deeply")
    try:
        return json.loads(text, parse_float=number, parse_constant=number)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def read_json(path: Path, finite: bool = True) -> dict[str, Any]:
    """Object of a JSON file; `finite` as of `parse_json`.

    Raises:
      DataError: it is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    found = parse_json(read_bytes(path), str(path), finite)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object")
    return found


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
