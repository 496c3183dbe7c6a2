"""Files as streams of bytes, decompressed if they are .gz or .zst, and of lines, which only line feeds end."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config.errors import ConfigError, DataError

COMPRESSED = ("gz", "zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 2**14  # bytes of a .zst that are decompressed at once


def suffix_of(path: Path) -> str:
    """Returns the last suffix of a file name before .gz or .zst, in lower case; "jsonl" for ndjson, "" for none."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "jsonl" if last == "ndjson" else last


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file and yields its raw and its decompressed stream, the same if it is not compressed.

    Raises:
      ConfigError: the library that decompresses it is not installed.
      DataError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as raw:
            yield raw, _decompressed(path, raw)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        raise DataError(f"{path} is damaged: {error}") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)  # type: ignore[return-value]
        case ".zst":
            return io.BufferedReader(_PieceStream(_zstandard(path, raw)))
    return raw


def _zstandard(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    # The stream of the library ends without an error if the file is truncated.
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{path} needs zstandard: pip install 'gptjax[data]'") from error
    frame = None
    while piece := raw.read(CHUNK_BYTES):
        while piece:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise DataError(f"{path} is damaged: {error}") from error
            piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends within a compressed frame")


class _PieceStream(io.RawIOBase):
    """Stream over pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.buffered = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.buffered:
            try:
                self.buffered = next(self.pieces)
            except StopIteration:
                return 0
        count = min(len(buffer), len(self.buffered))
        buffer[:count], self.buffered = self.buffered[:count], self.buffered[count:]
        return count


def lines(path: Path, stream: BinaryIO, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterates over line numbers, from 1, and lines with their ends.

    Raises:
      DataError: a line has a zero byte, or more than `limit` bytes.
    """
    number = 0
    while line := stream.readline(-1 if limit is None else limit + 1):
        number += 1
        check_size(path, line, limit)
        if b"\0" in line:
            raise DataError(f"{path} is not text: it has a zero byte in line {number:,}")
        yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def strip_newline(line: str) -> str:
    """Removes the line feed at the end of a line, if there is one, and the carriage return before it."""
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def check_size(path: Path, raw: bytes, limit: int | None) -> None:
    """Raises DataError if the bytes exceed the largest size of a document."""
    if limit is not None and len(raw) > limit:
        raise too_large(path, limit)


def too_large(path: Path, limit: int | None) -> DataError:
    """Returns the error for a document that exceeds the largest size."""
    return DataError(
        f"{path} has a document of more than {limit or sys.maxsize:,} bytes; raise --max_document, or cut it, "
        "in .txt files by --separator or --document_start"
    )
