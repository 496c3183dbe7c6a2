"""Files of documents for `gptjax.prepare`: texts, which separators may split into documents, and records.

Files are streamed in two stages: `items` runs in one process and splits a file into raw items, `parse` decodes an item
and may run in another process. Neither ever holds much more of a file than a document.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.config.errors import DataError
from gptjax.core.files import decode_lossy
from gptjax.data import records
from gptjax.data.records import Item, Record, RecordOptions
from gptjax.data.streams import BYTE_ORDER_MARK, check_size, lines, suffix_of, too_large

FORMATS = ("txt", *records.FORMATS)


class ReadOptions(NamedTuple):
    """Options for reading documents from files."""

    format: str = ""  # one of FORMATS; "": by the file name
    text_key: str = "text"  # field of a record, or a column number of a table without a header
    prompt_key: str = ""  # of pairs: comma-separated fields, joined by newlines; "": no prompts
    prompt_ending: str = "\n"  # between a prompt and its text
    document_start: str = ""  # of .txt: regular expression of lines that begin a document
    separator: str = ""  # of .txt: line between documents
    max_document: int = 256 * 2**20  # bytes

    def prompt_keys(self) -> list[str]:
        """Returns the fields that prompts consist of."""
        return [key for key in self.prompt_key.split(",") if key]


class Text(NamedTuple):
    """Document in the course of preparation."""

    prompt: str
    text: str
    repaired: bool = False  # True if it was not UTF-8; U+FFFD replaces invalid bytes


def format_of(path: Path) -> str:
    """Returns the format by the file name; "txt" if the name has no known one."""
    return suffix_of(path) if has_known_format(path) else "txt"


def has_known_format(path: Path) -> bool:
    """Returns True if the file name has a known format."""
    return suffix_of(path) in FORMATS


def items(path: Path, reading: ReadOptions, advance: Callable[[int], None] = lambda count: None) -> Iterator[Item]:
    """Iterates over the raw documents of a file, for `parse`; calls `advance` with the number of bytes read.

    Raises:
      DataError: the file cannot be read, or a document is larger than `reading.max_document`.
      ConfigError: a library that the format needs is not installed.
    """
    format = reading.format or format_of(path)
    if format == "txt":
        return records.read_items(path, partial(_texts, path, reading), advance)
    columns = (*reading.prompt_keys(), reading.text_key)
    options = RecordOptions(numbered=reading.text_key.isdigit(), columns=columns, limit=reading.max_document)
    return records.items(path, options, format, advance)


def parse(path: Path, item: Item, reading: ReadOptions) -> Text:
    """Decodes an item.

    Raises:
      DataError: the item does not have the format, or lacks the field that `reading` names.
    """
    format = reading.format or format_of(path)
    if format != "txt":
        return _of_fields(records.parse(path, item, format), reading)
    assert isinstance(item.raw, bytes)
    if b"\0" in item.raw:
        offset = item.raw.index(0)
        raise DataError(f"{path}, document {item.number:,}, is not text: it has a zero byte at {offset}")
    return Text("", *decode_lossy(item.raw))


def _of_fields(record: Record, reading: ReadOptions) -> Text:
    def field(key: str, flag: str) -> str:
        if key not in record.fields:
            raise DataError(f"{record.where} has no {key!r} (--{flag}); it has {', '.join(map(str, record.fields))}")
        value = record.fields[key]
        if not isinstance(value, str):
            raise DataError(f"{record.where} has {key!r} that is {type(value).__name__} and not text (--{flag})")
        return value

    prompts = [field(key, "prompt_key") for key in reading.prompt_keys()]
    prompt = "\n".join(prompt for prompt in prompts if prompt)
    text = field(reading.text_key, "text_key")
    return Text(prompt + reading.prompt_ending if prompts else "", text, record.repaired)


def _texts(path: Path, reading: ReadOptions, stream: BinaryIO) -> Iterator[Item]:
    limit = reading.max_document
    if not (reading.document_start or reading.separator):
        content = stream.read(limit + 1)
        check_size(path, content, limit)
        yield Item(content.removeprefix(BYTE_ORDER_MARK), 1)
        return
    starts = re.compile(reading.document_start.encode()) if reading.document_start else None
    separator = reading.separator.encode()
    pending: list[bytes] = []
    number, size = 1, 0
    for _, line in lines(path, stream, limit):
        between = bool(separator) and line.strip() == separator
        if pending and (between or (starts is not None and starts.match(line))):
            yield Item(b"".join(pending), number)
            pending, number, size = [], number + 1, 0
        if not between:
            pending.append(line)
            size += len(line)
        if size > limit:
            raise too_large(path, limit)
    if pending:
        yield Item(b"".join(pending), number)


def size_of(item: Item) -> int:
    """Returns the approximate size of an item in bytes."""
    if isinstance(item.raw, bytes):
        return len(item.raw)
    values: Any = item.raw.values() if isinstance(item.raw, dict) else ()
    return sum(len(value) for value in values if isinstance(value, str))
