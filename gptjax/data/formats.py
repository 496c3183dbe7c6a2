"""Files of documents for preparing: texts, which a line may cut into several, and records, which have one in a field.

Read as a stream, in two halves: `items` runs in one process and cuts a file into raw items, `parse` makes text of an
item and may run in another. Neither ever holds more of a file than a document and its surroundings.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.config.errors import DataError
from gptjax.core.files import decode_lossy
from gptjax.data import records
from gptjax.data.records import Item, Options, Record
from gptjax.data.streams import BYTE_ORDER_MARK, check_size, lines, suffix_of, too_large

FORMATS = ("txt", *records.FORMATS)


class Reading(NamedTuple):
    """How documents lie in files."""

    format: str = ""  # one of FORMATS, whatever a file is called; "": as its name says
    text_key: str = "text"  # of records; a number is a column of a table without a header
    prompt_key: str = ""  # of pairs: a field, or several with commas, joined by line ends; "": there are no prompts
    prompt_ending: str = "\n"  # between a prompt and its text
    document_start: str = ""  # of .txt: a regular expression; a line that matches begins a document
    separator: str = ""  # of .txt: a line that is this stands between documents
    max_document: int = 256 * 2**20  # bytes

    def prompt_keys(self) -> list[str]:
        """Fields that prompts are in."""
        return [key for key in self.prompt_key.split(",") if key]


class Text(NamedTuple):
    """A document as it is worked on."""

    prompt: str
    text: str
    repaired: bool = False  # whether it was not UTF-8, and has U+FFFD where it was not


def name_of(path: Path) -> str:
    """The format that a file's name says; plain text where it says none."""
    return suffix_of(path) if is_known(path) else "txt"


def is_known(path: Path) -> bool:
    """Whether a file's name says which format it has."""
    return suffix_of(path) in FORMATS


def items(path: Path, reading: Reading, advance: Callable[[int], None] = lambda count: None) -> Iterator[Item]:
    """The documents of a file as `parse` takes them; `advance` is told how many of its bytes were read.

    Raises:
      DataError: it cannot be read, or a document is larger than `reading.max_document`.
      ConfigError: what reads it is not installed.
    """
    format = reading.format or name_of(path)
    if format == "txt":
        return records.cut(path, partial(_texts, path, reading), advance)
    columns = (*reading.prompt_keys(), reading.text_key)
    options = Options(numbered=reading.text_key.isdigit(), columns=columns, limit=reading.max_document)
    return records.items(path, options, format, advance)


def parse(path: Path, item: Item, reading: Reading) -> Text:
    """The text of an item.

    Raises:
      DataError: it is not what the format says, or lacks the field that `reading` names.
    """
    format = reading.format or name_of(path)
    if format != "txt":
        return _of_fields(records.parse(path, item, format), reading)
    assert isinstance(item.raw, bytes)
    if b"\0" in item.raw:
        zero = item.raw.index(0)
        raise DataError(f"{path}, document {item.number:,}, is not text: it has a zero byte at {zero}")
    return Text("", *decode_lossy(item.raw))


def _of_fields(record: Record, reading: Reading) -> Text:
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


def _texts(path: Path, reading: Reading, stream: BinaryIO) -> Iterator[Item]:
    limit = reading.max_document
    if not (reading.document_start or reading.separator):
        whole = stream.read(limit + 1)
        check_size(path, whole, limit)
        yield Item(whole.removeprefix(BYTE_ORDER_MARK), 1)
        return
    starts = re.compile(reading.document_start.encode()) if reading.document_start else None
    separator = reading.separator.encode()
    held: list[bytes] = []
    number, size = 1, 0
    for _, line in lines(path, stream, limit):
        between = bool(separator) and line.strip() == separator
        if held and (between or (starts is not None and starts.match(line))):
            yield Item(b"".join(held), number)
            held, number, size = [], number + 1, 0
        if not between:
            held.append(line)
            size += len(line)
        if size > limit:
            raise too_large(path, limit)
    if held:
        yield Item(b"".join(held), number)


def size_of(item: Item) -> int:
    """About how many bytes an item has."""
    if isinstance(item.raw, bytes):
        return len(item.raw)
    values: Any = item.raw.values() if isinstance(item.raw, dict) else ()
    return sum(len(value) for value in values if isinstance(value, str))
