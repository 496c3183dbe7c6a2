r"""Records with named fields, read from .json, .jsonl, .csv, .tsv and .parquet files, each also as .gz and .zst.

Preparation, training, parallel text and prompts all use this reader. It has two stages: `items` runs in one process and
splits a file into raw items, holding little more than one item at a time (a .json file is read whole); `parse` makes a
record of an item and may run in another process. `read` combines both.

Text is UTF-8 with or without a byte order mark, and only \n and \r\n end lines. Bytes that are not UTF-8 and unpaired
surrogates become U+FFFD, and the record is marked as repaired; a file with a zero byte is not text.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console
from gptjax.core.files import decode_lossy, parse_json
from gptjax.data.streams import BYTE_ORDER_MARK, lines, open_stream, strip_newline, suffix_of, too_large

BATCH = 256  # rows of a .parquet

Fields = dict[str, Any]


class Record(NamedTuple):
    """Record of a file.

    Attributes:
      fields: values by name; all text in a table.
      where: file and line, for messages.
      repaired: True if it was not UTF-8; U+FFFD replaces invalid bytes.
    """

    fields: Fields
    where: str
    repaired: bool = False


class Item(NamedTuple):
    """Raw record or document of a file.

    Attributes:
      raw: a line, a document, or parsed fields.
      number: number of its first line, from 1; of the record in a format without lines.
      repaired: see `Record`; False where it is not known yet.
    """

    raw: bytes | Fields
    number: int
    repaired: bool = False


class RecordOptions(NamedTuple):
    """Options for reading records."""

    names: tuple[str, ...] = ()  # column names of a table without a header
    numbered: bool = False  # a table has no header, and its columns are named 0, 1, ...
    columns: tuple[str, ...] = ()  # columns of a .parquet to read; (): all
    limit: int | None = None  # largest size in bytes of a record, or of a .json file


DEFAULT_OPTIONS = RecordOptions()


class Format(NamedTuple):
    """File format."""

    items: Callable[[Path, BinaryIO, RecordOptions], Iterator[Item]]
    parse: Callable[[Item, str], Record]  # (item, its location for messages)
    unit: str  # name of an item in messages


def read(path: Path, options: RecordOptions = DEFAULT_OPTIONS, format: str = "") -> Iterator[Record]:
    """Iterates over the records of a file in order, and reports at the end how many were repaired.

    Args:
      path: file.
      options: see `RecordOptions`.
      format: one of FORMATS; "": by the file name.

    Raises:
      ConfigError: a library that the format needs is not installed.
      DataError: the file cannot be read or is damaged, or a record is malformed.
    """
    format = format or suffix_of(path)
    count = repaired = 0
    for item in items(path, options, format):
        record = parse(path, item, format)
        count, repaired = count + 1, repaired + record.repaired
        yield record
    if repaired:
        console.say(f"records    {repaired:,} of {count:,} of {path} are not UTF-8 and are repaired with U+FFFD")


def items(
    path: Path, options: RecordOptions, format: str, advance: Callable[[int], None] = lambda count: None
) -> Iterator[Item]:
    """Iterates over the items of a file, for `parse`; calls `advance` with the number of bytes read.

    Raises:
      ConfigError, DataError: see `read`.
    """
    if format not in FORMATS:
        raise DataError(f"{path} is not a file of records; there are .{', .'.join(FORMATS)}")
    return read_items(path, lambda stream: FORMATS[format].items(path, stream, options), advance)


def read_items(
    path: Path, reader: Callable[[BinaryIO], Iterator[Item]], advance: Callable[[int], None] = lambda count: None
) -> Iterator[Item]:
    """Iterates over the items of a decompressed file; calls `advance` with the number of bytes read."""
    with open_stream(path) as (raw, stream):
        done = 0
        for item in reader(stream):
            yield item
            advance(raw.tell() - done)
            done = raw.tell()
        advance(path.stat().st_size - done)


def parse(path: Path, item: Item, format: str) -> Record:
    """Parses an item into a record.

    Raises:
      DataError: the item is malformed.
    """
    file_format = FORMATS[format]
    return file_format.parse(item, f"{path}, {file_format.unit} {item.number:,}")


# Objects

# Escapes of JSON: first a surrogate pair, then an unpaired surrogate, then any other.
_HEX = "[0-9a-fA-F]"
_HALF = re.compile(rf"\\u[dD][89a-fA-F]{_HEX}{{2}}")
_ESCAPE = re.compile(rf"\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}|({_HALF.pattern})|\\.", re.DOTALL)


def parse_repaired(text: str, where: str) -> tuple[Any, bool]:
    """Parses JSON and replaces unpaired surrogates; returns the value and True if any was replaced.

    Raises:
      DataError: see `parse_json`.
    """
    repaired_text = text
    if _HALF.search(text):
        repaired_text = _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    return parse_json(repaired_text, where, finite=False), repaired_text != text


def _object(value: Any, where: str) -> Fields:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not an object with fields")
    return value


def _items_of_jsonl(path: Path, stream: BinaryIO, options: RecordOptions) -> Iterator[Item]:
    return (Item(line, number) for number, line in lines(path, stream, options.limit) if line.strip())


def _parse_jsonl(item: Item, where: str) -> Record:
    assert isinstance(item.raw, bytes)
    text, repaired = decode_lossy(item.raw)
    value, replaced = parse_repaired(text, where)
    return Record(_object(value, where), where, repaired or replaced)


def _items_of_json(path: Path, stream: BinaryIO, options: RecordOptions) -> Iterator[Item]:
    content = stream.read(-1 if options.limit is None else options.limit + 1)
    if options.limit is not None and len(content) > options.limit:
        raise DataError(f"{path} has more than {options.limit:,} bytes; as .jsonl it could be read in pieces")
    if b"\0" in content:
        raise DataError(f"{path} is not text: it has a zero byte at {content.index(0):,}")
    text, repaired = decode_lossy(content.removeprefix(BYTE_ORDER_MARK))
    values, replaced = parse_repaired(text, str(path))
    if not isinstance(values, list):
        raise DataError(f"{path} is not a list of objects")
    for number, value in enumerate(values, 1):
        yield Item(value, number, (repaired or replaced) and any("\ufffd" in text for text in strings(value)))


def strings(value: Any) -> Iterator[str]:
    """Iterates over the strings of a JSON value in order, without the keys of objects."""
    stack = [value]  # not by recursion: a text may be nested as deeply as the parser goes
    while stack:
        match stack.pop():
            case str() as text:
                yield text
            case dict() as fields:
                stack += reversed(fields.values())
            case list() as values:
                stack += reversed(values)


def _parse_object(item: Item, where: str) -> Record:
    return Record(_object(item.raw, where), where, item.repaired)


# Tables

Row = tuple[int, list[str], bool]  # number of its first line, fields, whether it was repaired


def _items_of_table(rows: Callable[[Path, BinaryIO, int | None], Iterator[Row]]) -> Callable[..., Iterator[Item]]:
    def items(path: Path, stream: BinaryIO, options: RecordOptions) -> Iterator[Item]:
        names = list(options.names)
        check_names(names, path)
        for number, row, repaired in rows(path, stream, options.limit):
            if not row or (len(row) == 1 != len(names) and not row[0].strip()):
                continue  # a blank line
            if not names:
                names = [str(i) for i in range(len(row))] if options.numbered else row
                check_names(names, path)
                if not options.numbered:
                    continue
            if len(row) != len(names):
                expected = f"the {len(names)} that {'line 1 has' if options.numbered else f'have names: {names}'}"
                raise DataError(f"{path}, line {number:,} has {len(row)} fields and not {expected}")
            yield Item(dict(zip(names, row, strict=True)), number, repaired)

    return items


def check_names(names: Sequence[str], path: Path) -> None:
    """Raises DataError if two columns have the same name; several columns may be unnamed."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}; rename one of them")


def _rows_of_tsv(path: Path, stream: BinaryIO, limit: int | None) -> Iterator[Row]:
    for number, line in lines(path, stream, limit):
        text, repaired = decode_lossy(line)
        text = strip_newline(text)
        yield number, text.split("\t") if text else [], repaired


_LONE_RETURN = re.compile(r"\r(?!\n)")


def _rows_of_csv(path: Path, stream: BinaryIO, limit: int | None) -> Iterator[Row]:
    damaged = [False]

    def texts() -> Iterator[str]:
        for _, line in lines(path, stream, limit):
            text, repaired = decode_lossy(line)
            damaged[0] |= repaired
            yield _LONE_RETURN.sub("\0", text) if "\r" in text else text  # the csv module would end a line there

    csv.field_size_limit(limit or sys.maxsize)
    rows = csv.reader(texts(), strict=True)
    while True:
        first, damaged[0] = rows.line_num + 1, False
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _csv_error(error, path, first, rows.line_num, limit) from error
        if row is None:
            return
        yield first, [field.replace("\0", "\r") for field in row], damaged[0]


def _csv_error(error: csv.Error, path: Path, first: int, last: int, limit: int | None) -> DataError:
    match str(error).partition(" ")[0]:
        case "field":  # larger than field limit
            return too_large(path, limit)
        case "unexpected":  # end of data
            return DataError(f"{path}, line {first:,} has a field whose quote is never closed")
    where = f"{path}, line {last:,}" + (f" (of the record from line {first:,} on)" if last > first else "")
    return DataError(f'{where} has text behind a closing quote; quotes within a field are doubled, as in ""')


# Parquet


def _items_of_parquet(path: Path, stream: BinaryIO, options: RecordOptions) -> Iterator[Item]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'gptjax[data]'") from error
    number = 0
    try:
        file_stream = stream if suffix_of(path) == path.suffix.lower()[1:] else io.BytesIO(stream.read())
        with parquet.ParquetFile(file_stream) as file:
            names = file.schema_arrow.names
            check_names(names, path)
            for key in options.columns:
                if key not in names:
                    raise DataError(f"{path} has no column {key!r}; it has {', '.join(names)}")
            for batch in file.iter_batches(batch_size=BATCH, columns=list(options.columns) or None):
                for fields, repaired in _rows_of_batch(batch):
                    number += 1
                    yield Item(fields, number, repaired)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _rows_of_batch(batch: Any) -> Iterator[tuple[Fields, bool]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            damaged: list[bool] = []
            yield {name: _scalar_value(batch[name][i], damaged) for name in batch.schema.names}, any(damaged)
        return
    yield from ((row, False) for row in rows)


def _scalar_value(scalar: Any, damaged: list[bool]) -> Any:
    # A value of Parquet whose texts need not be UTF-8.
    import pyarrow

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pyarrow.types.is_dictionary(kind):
        return _scalar_value(scalar.value, damaged)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        text, repaired = decode_lossy(scalar.as_buffer().to_pybytes())
        damaged.append(repaired)
        return text
    if pyarrow.types.is_struct(kind):
        return {name: _scalar_value(value, damaged) for name, value in scalar.items()}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_scalar_value(value, damaged) for value in scalar.values]
    return scalar.as_py()


ROWS: dict[str, Callable[[Path, BinaryIO, int | None], Iterator[Row]]] = {"csv": _rows_of_csv, "tsv": _rows_of_tsv}

FORMATS: dict[str, Format] = {
    "json": Format(_items_of_json, _parse_object, "record"),
    "jsonl": Format(_items_of_jsonl, _parse_jsonl, "line"),
    **{name: Format(_items_of_table(rows), _parse_object, "line") for name, rows in ROWS.items()},
    "parquet": Format(_items_of_parquet, _parse_object, "record"),
}
