"""Reads text and JSON, writes files and directories atomically, locks files, and explains file system errors.

Every text file is read and written as UTF-8 in any locale, by these functions or by an `open` with an encoding.
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
    """Returns the content of a file.

    Raises:
      DataError: the file is missing, cannot be read, or is a pipe or device.
    """
    check_is_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def check_is_file(path: Path) -> None:
    """Raises DataError for paths that may never end: named pipes, sockets and devices, except the null device.

    A pipe of this process, such as the shell's `<(...)`, has a writer and is allowed.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise DataError(f"cannot read {str(path)!r}: a path has no zero byte") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    own_pipe = str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or own_pipe or os.path.samefile(path, os.devnull)):
        raise DataError(f"cannot read {path}: it is a pipe or a device, not a file")


def decode(raw: bytes, where: str) -> str:
    """Decodes UTF-8 text without a byte order mark; line endings are unchanged.

    Args:
      raw: content of a file.
      where: name of the file, for the message.

    Raises:
      DataError: the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line:,}") from error


def decode_lossy(raw: bytes) -> tuple[str, bool]:
    """Decodes UTF-8 with U+FFFD for invalid bytes; also returns True if there were any."""
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace"), True


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which UTF-8 cannot encode, by U+FFFD.

    They come from escapes in JSON and from command line arguments that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file without a byte order mark; line endings are unchanged.

    Raises:
      DataError: the file is missing, cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(path), str(path))


# Limit of nested arrays and objects; the parser's own limit differs between versions of Python.
MAX_DEPTH = 500
_NESTING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|([\[{])|[\]}]', re.DOTALL)


def is_too_deep(text: str) -> bool:
    """Returns True if a JSON text nests more than MAX_DEPTH arrays and objects."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _NESTING.finditer(text):
        if text[match.start()] != '"':
            depth += 1 if match[1] else -1
            if depth > MAX_DEPTH:
                return True
    return False


def parse_json(text: str | bytes, where: str, finite: bool = True) -> Any:
    """Parses a JSON text.

    Args:
      text: the text; bytes are UTF-8, with or without a byte order mark.
      where: file, and line or record if there are several, for the message.
      finite: refuse NaN and infinity, which Python writes although JSON does not have them.

    Raises:
      DataError: invalid JSON, nested too deeply, or with a number that is not finite.
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
    """Reads the object in a JSON file; `finite` is that of `parse_json`.

    Raises:
      DataError: the file is missing, cannot be read, or does not hold a JSON object.
    """
    value = parse_json(read_bytes(path), str(path), finite)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it; on failure the old file is kept."""
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


# File system errors that may be temporary, with remedies.
DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "the file would be larger than is allowed here; raise that limit (ulimit -f)",
    errno.EIO: "the disk has an input/output error; check it",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.ESTALE: "the network file system has lost the file; mount it again",
}


def disk_error(error: BaseException | None) -> str:
    """Describes a file system error in the chain of causes, with a remedy; "" for any other error.

    tensorstore's errors have the system's message but no error number.
    """
    while error is not None:
        for number, description in DISK_ERRORS.items():
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
                return description
        error = error.__cause__ or error.__context__
    return ""


def is_new_or_empty(folder: Path) -> bool:
    """Returns True if a path does not exist or is an empty directory."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `folder` if the block succeeds, else deleted."""
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
def file_lock(path: Path) -> Iterator[bool]:
    """Locks an existing file during the block; yields False if another process holds the lock.

    The lock is released when the process ends, in any way.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
