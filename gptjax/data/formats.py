"""Files of documents, read as a stream: .txt, .json, .jsonl, .csv, .tsv, .parquet; those of text also as .gz and .zst.

Reading is in two halves. `read` runs in one process and cuts a file into raw items, each a document; `parse` makes text
of an item and may run in another. Neither ever holds more of a file than a document and its surroundings.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.config import ConfigError, DataError


class Reading(NamedTuple):
    """How documents lie in files."""

    format: str = ""  # one of FORMATS, whatever a file is called; "": as its name says
    text_key: str = "text"  # of .json, .jsonl, .csv, .tsv, .parquet; a number is a column of a file without a header
    prompt_key: str = ""  # of pairs: a field, or several with commas, joined by line ends; "": there are no prompts
    prompt_ending: str = "\n"  # between a prompt and its text
    document_start: str = ""  # of .txt: a regular expression; a line that matches begins a document
    separator: str = ""  # of .txt: a line that is this stands between documents
    max_document: int = 256 * 2**20  # bytes


class Text(NamedTuple):
    """A document as it is worked on."""

    prompt: str
    text: str
    repaired: bool = False  # whether it was not UTF-8, and has U+FFFD where it was not


class Format(NamedTuple):
    """One kind of file."""

    read: Callable[[Path, BinaryIO, Reading], Iterator[Any]]  # items
    parse: Callable[[Any, Reading, str], Text]  # item, how, where it is: for messages


def _said(path: Path) -> str | None:
    """The format that a file's name says, if it says one."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] in ("gz", "zst"):
        suffixes.pop()
    last = {"ndjson": "jsonl"}.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    return last if last in FORMATS else None


def name_of(path: Path) -> str:
    """The format that a file's name says; plain text where it says none."""
    return _said(path) or "txt"


def is_known(path: Path) -> bool:
    """Whether a file's name says which format it has."""
    return _said(path) is not None


def items(path: Path, reading: Reading, advance: Callable[[int], None] = lambda count: None) -> Iterator[Any]:
    """The documents of a file as its format's `parse` takes them; `advance` is told how many of its bytes were read.

    Raises:
      DataError: it cannot be read, or a document is larger than `reading.max_document`.
      ConfigError: what reads it is not installed.
    """
    try:
        with path.open("rb") as raw:
            done = 0
            for item in FORMATS[reading.format or name_of(path)].read(path, _unpacked(path, raw), reading):
                yield item
                advance(raw.tell() - done)
                done = raw.tell()
            advance(path.stat().st_size - done)
    except (OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        raise DataError(f"{path} is damaged: {error}") from error


def parse(path: Path, item: Any, reading: Reading, number: int) -> Text:
    """The text of an item.

    Raises:
      DataError: it is not what the format says, or lacks the field that `reading` names.
    """
    return FORMATS[reading.format or name_of(path)].parse(item, reading, f"{path}, document {number:,}")


def _unpacked(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f"{path} needs zstandard: pip install 'gptjax[data]'") from error
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))  # type: ignore
    return raw


def _too_large(path: Path, reading: Reading) -> DataError:
    return DataError(
        f"{path} has a document of more than {reading.max_document:,} bytes; raise --max_document, or cut it, "
        "in .txt files by --separator or --document_start"
    )


def _lines(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[bytes]:
    while line := stream.readline(reading.max_document + 1):
        if len(line) > reading.max_document:
            raise _too_large(path, reading)
        yield line


# Plain text


def _read_text(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[bytes]:
    if not (reading.document_start or reading.separator):
        whole = stream.read(reading.max_document + 1)
        if len(whole) > reading.max_document:
            raise _too_large(path, reading)
        yield whole
        return
    starts = re.compile(reading.document_start.encode()) if reading.document_start else None
    separator = reading.separator.encode()
    held: list[bytes] = []
    size = 0
    for line in _lines(path, stream, reading):
        between = bool(separator) and line.strip() == separator
        if held and (between or (starts is not None and starts.match(line))):
            yield b"".join(held)
            held, size = [], 0
        if not between:
            held.append(line)
            size += len(line)
        if size > reading.max_document:
            raise _too_large(path, reading)
    if held:
        yield b"".join(held)


def _parse_text(item: bytes, reading: Reading, where: str) -> Text:
    if b"\0" in item:
        raise DataError(f"{where}, is not text: it has a zero byte at {item.index(0)}")
    return _decoded(item)


def _decoded(raw: bytes) -> Text:
    try:
        return Text("", raw.decode("utf-8"))
    except UnicodeDecodeError:
        return Text("", raw.decode("utf-8", "replace"), repaired=True)


# Objects with fields


def _read_jsonl(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[bytes]:
    return (line for line in _lines(path, stream, reading) if line.strip())


def _parse_jsonl(item: bytes, reading: Reading, where: str) -> Text:
    decoded = _decoded(item)
    try:
        record = json.loads(decoded.text)
    except ValueError as error:
        raise DataError(f"{where}, is not JSON: {error}") from error
    return _of_fields(record, reading, where)._replace(repaired=decoded.repaired)


def _read_json(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[Any]:
    whole = stream.read(reading.max_document + 1)
    if len(whole) > reading.max_document:
        raise DataError(f"{path} has more than {reading.max_document:,} bytes; as .jsonl it could be read in pieces")
    try:
        records = json.loads(whole)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path} is not a list of objects")
    yield from records


def _of_fields(record: Any, reading: Reading, where: str) -> Text:
    if not isinstance(record, dict):
        raise DataError(f"{where}, is no object with fields")

    def field(key: str, flag: str) -> str:
        if key not in record:
            raise DataError(f"{where}, has no {key!r} (--{flag}); it has {', '.join(map(str, record))}")
        value = record[key]
        if not isinstance(value, str):
            raise DataError(f"{where}, has {key!r} that is {type(value).__name__} and not text (--{flag})")
        return value

    prompts = [field(key, "prompt_key") for key in reading.prompt_key.split(",") if key]
    prompt = "\n".join(prompt for prompt in prompts if prompt)
    return Text(prompt + reading.prompt_ending if prompts else "", field(reading.text_key, "text_key"))


def _read_csv(delimiter: str) -> Callable[[Path, BinaryIO, Reading], Iterator[Any]]:
    def read(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[dict[str, str]]:
        csv.field_size_limit(reading.max_document)
        lines = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        rows = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
        try:
            first = next(rows, [])
            numbered = reading.text_key.isdigit()
            names = [str(i) for i in range(len(first))] if numbered else first
            for row in [first] if numbered and first else []:
                yield dict(zip(names, row, strict=True))
            for row in rows:
                if len(row) < len(names):
                    raise DataError(f"{path}, line {rows.line_num:,}, has {len(row)} fields and not {len(names)}")
                yield dict(zip(names, row, strict=False))
        except csv.Error as error:
            if "field larger than field limit" in str(error):
                raise _too_large(path, reading) from error
            raise DataError(f"{path}, line {rows.line_num:,}: {error}") from error
        finally:
            lines.detach()

    return read


def _parse_csv(item: dict[str, str], reading: Reading, where: str) -> Text:
    found = _of_fields(item, reading, where)
    return found._replace(repaired="\ufffd" in found.text)


def _read_parquet(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'gptjax[data]'") from error
    try:
        with parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            wanted = [key for key in [*reading.prompt_key.split(","), reading.text_key] if key]
            for key in wanted:
                if key not in names:
                    raise DataError(f"{path} has no column {key!r}; it has {', '.join(names)}")
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged: {error}") from error


FORMATS: dict[str, Format] = {
    "txt": Format(_read_text, _parse_text),
    "json": Format(_read_json, _of_fields),
    "jsonl": Format(_read_jsonl, _parse_jsonl),
    "csv": Format(_read_csv(","), _parse_csv),
    "tsv": Format(_read_csv("\t"), _parse_csv),
    "parquet": Format(_read_parquet, _of_fields),
}


def size_of(item: Any) -> int:
    """About how many bytes an item has."""
    if isinstance(item, bytes | str):
        return len(item)
    values: Iterable[Any] = item.values() if isinstance(item, dict) else ()
    return sum(len(value) for value in values if isinstance(value, str))
