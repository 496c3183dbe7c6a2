r"""Records with named fields out of files: .json, .jsonl, .csv, .tsv, .parquet, each also as .gz and .zst.

The one reader of them, for preparing, training, parallel text and prompts. It reads in two halves: `items` runs in one
process and cuts a file into raw items, never holding more of it than one of them and its surroundings (but a .json,
which is read whole); `parse` makes a record of an item and may run in another. `read` is both.

Text is UTF-8 with or without a byte order mark, and only \n and \r\n end its lines. What is no UTF-8 within a record,
and half of a surrogate pair, is U+FFFD in it, and the record says so; a file with a zero byte is no text.
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
from gptjax.data.streams import BYTE_ORDER_MARK, lines, opened, suffix_of, too_large, without_end

BATCH = 256  # rows of a .parquet

Fields = dict[str, Any]


class Record(NamedTuple):
    """A record.

    Attributes:
      fields: by name; of a table they are text.
      where: it stands, for messages.
      repaired: whether it was not UTF-8, and has U+FFFD where it was not.
    """

    fields: Fields
    where: str
    repaired: bool = False


class Item(NamedTuple):
    """A record, or a document, as it was cut out of its file.

    Attributes:
      raw: a line or a document; or fields.
      number: of the first of its lines, from 1; in a format without lines of the record itself.
      repaired: see `Record`, as far as it is known.
    """

    raw: bytes | Fields
    number: int
    repaired: bool = False


class Options(NamedTuple):
    """How records lie in a file."""

    names: tuple[str, ...] = ()  # of the columns of a table that has no header
    numbered: bool = False  # a table has no header, and its columns are called 0, 1, ...
    columns: tuple[str, ...] = ()  # which ones of a .parquet are read; (): all
    limit: int | None = None  # bytes of a record, of a .json file


USUAL = Options()


class Format(NamedTuple):
    """One kind of file."""

    items: Callable[[Path, BinaryIO, Options], Iterator[Item]]
    parse: Callable[[Item, str], Record]  # item, and where it is
    unit: str  # that items are counted in


def read(path: Path, options: Options = USUAL, format: str = "") -> Iterator[Record]:
    """Records of a file, in order; at its end it is said how many were repaired.

    Args:
      path: of the file.
      options: how they lie in it.
      format: one of FORMATS, whatever the file is called; "": as its name says.

    Raises:
      ConfigError: what reads the file is not installed.
      DataError: it cannot be read, is damaged, or a record is none.
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
    path: Path, options: Options, format: str, advance: Callable[[int], None] = lambda count: None
) -> Iterator[Item]:
    """Items of a file, as `parse` takes them; `advance` is told how many of its bytes were read.

    Raises:
      ConfigError, DataError: as of `read`.
    """
    if format not in FORMATS:
        raise DataError(f"{path} is no file of records; there are .{', .'.join(FORMATS)}")
    return cut(path, lambda stream: FORMATS[format].items(path, stream, options), advance)


def cut(
    path: Path, reader: Callable[[BinaryIO], Iterator[Item]], advance: Callable[[int], None] = lambda count: None
) -> Iterator[Item]:
    """What a reader gives of an unpacked file; `advance` is told how many of its bytes were read."""
    with opened(path) as (raw, stream):
        done = 0
        for item in reader(stream):
            yield item
            advance(raw.tell() - done)
            done = raw.tell()
        advance(path.stat().st_size - done)


def parse(path: Path, item: Item, format: str) -> Record:
    """The record that an item is.

    Raises:
      DataError: it is none.
    """
    of = FORMATS[format]
    return of.parse(item, f"{path}, {of.unit} {item.number:,}")


# Objects

# An escape of JSON, the first kind being two halves of a pair, and the second one half alone.
_HEX = "[0-9a-fA-F]"
_HALF = re.compile(rf"\\u[dD][89a-fA-F]{_HEX}{{2}}")
_ESCAPE = re.compile(rf"\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}|({_HALF.pattern})|\\.", re.DOTALL)


def parsed(text: str, where: str) -> tuple[Any, bool]:
    """The value of a JSON text, and whether half of a surrogate pair in it was repaired; errors as of `parse_json`."""
    whole = text
    if _HALF.search(text):
        whole = _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], text)
    return parse_json(whole, where, finite=False), whole != text


def _object(value: Any, where: str) -> Fields:
    if not isinstance(value, dict):
        raise DataError(f"{where} is no object with fields")
    return value


def _items_of_jsonl(path: Path, stream: BinaryIO, options: Options) -> Iterator[Item]:
    return (Item(line, number) for number, line in lines(path, stream, options.limit) if line.strip())


def _parse_jsonl(item: Item, where: str) -> Record:
    assert isinstance(item.raw, bytes)
    text, repaired = decode_lossy(item.raw)
    value, mended = parsed(text, where)
    return Record(_object(value, where), where, repaired or mended)


def _items_of_json(path: Path, stream: BinaryIO, options: Options) -> Iterator[Item]:
    whole = stream.read(-1 if options.limit is None else options.limit + 1)
    if options.limit is not None and len(whole) > options.limit:
        raise DataError(f"{path} has more than {options.limit:,} bytes; as .jsonl it could be read in pieces")
    if b"\0" in whole:
        raise DataError(f"{path} is not text: it has a zero byte at {whole.index(0):,}")
    text, repaired = decode_lossy(whole.removeprefix(BYTE_ORDER_MARK))
    found, mended = parsed(text, str(path))
    if not isinstance(found, list):
        raise DataError(f"{path} is not a list of objects")
    for number, one in enumerate(found, 1):
        yield Item(one, number, (repaired or mended) and any("\ufffd" in text for text in strings(one)))


def strings(value: Any) -> Iterator[str]:
    """The texts in what JSON holds, in order, keys of objects left out."""
    left = [value]  # not by recursion: a text may be nested as deeply as the parser goes
    while left:
        match left.pop():
            case str() as text:
                yield text
            case dict() as fields:
                left += reversed(fields.values())
            case list() as values:
                left += reversed(values)


def _parse_object(item: Item, where: str) -> Record:
    return Record(_object(item.raw, where), where, item.repaired)


# Tables

Row = tuple[int, list[str], bool]  # number of its first line, fields, whether it was repaired


def _items_of_table(rows: Callable[[Path, BinaryIO, int | None], Iterator[Row]]) -> Callable[..., Iterator[Item]]:
    def items(path: Path, stream: BinaryIO, options: Options) -> Iterator[Item]:
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
                there = f"the {len(names)} that {'line 1 has' if options.numbered else f'have names: {names}'}"
                raise DataError(f"{path}, line {number:,} has {len(row)} fields and not {there}")
            yield Item(dict(zip(names, row, strict=True)), number, repaired)

    return items


def check_names(names: Sequence[str], path: Path) -> None:
    """Raises DataError where two columns have one name; columns without names, which nobody can ask for, may."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name.strip()]
    if twice:
        raise DataError(f"{path} has two columns called {twice[0]!r}; rename one of them")


def _rows_of_tsv(path: Path, stream: BinaryIO, limit: int | None) -> Iterator[Row]:
    for number, line in lines(path, stream, limit):
        text, repaired = decode_lossy(line)
        text = without_end(text)
        yield number, text.split("\t") if text else [], repaired


_LONE_RETURN = re.compile(r"\r(?!\n)")


def _rows_of_csv(path: Path, stream: BinaryIO, limit: int | None) -> Iterator[Row]:
    damaged = [False]

    def texts() -> Iterator[str]:
        for _, line in lines(path, stream, limit):
            text, repaired = decode_lossy(line)
            damaged[0] |= repaired
            yield _LONE_RETURN.sub("\0", text) if "\r" in text else text  # which csv would end a line at

    csv.field_size_limit(limit or sys.maxsize)
    rows = csv.reader(texts(), strict=True)
    while True:
        first, damaged[0] = rows.line_num + 1, False
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _of_csv(error, path, first, rows.line_num, limit) from error
        if row is None:
            return
        yield first, [field.replace("\0", "\r") for field in row], damaged[0]


def _of_csv(error: csv.Error, path: Path, first: int, last: int, limit: int | None) -> DataError:
    match str(error).partition(" ")[0]:
        case "field":  # larger than field limit
            return too_large(path, limit)
        case "unexpected":  # end of data
            return DataError(f"{path}, line {first:,} has a field whose quote is never closed")
    where = f"{path}, line {last:,}" + (f" (of the record from line {first:,} on)" if last > first else "")
    return DataError(f'{where} has text behind a closing quote; quotes within a field are doubled, as in ""')


# Parquet


def _items_of_parquet(path: Path, stream: BinaryIO, options: Options) -> Iterator[Item]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install 'gptjax[data]'") from error
    number = 0
    try:
        whole = stream if suffix_of(path) == path.suffix.lower()[1:] else io.BytesIO(stream.read())
        with parquet.ParquetFile(whole) as file:
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
            yield {name: _of_scalar(batch[name][i], damaged) for name in batch.schema.names}, any(damaged)
        return
    yield from ((row, False) for row in rows)


def _of_scalar(scalar: Any, damaged: list[bool]) -> Any:
    # A value of Parquet whose texts need not be UTF-8.
    import pyarrow

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pyarrow.types.is_dictionary(kind):
        return _of_scalar(scalar.value, damaged)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        text, repaired = decode_lossy(scalar.as_buffer().to_pybytes())
        damaged.append(repaired)
        return text
    if pyarrow.types.is_struct(kind):
        return {name: _of_scalar(value, damaged) for name, value in scalar.items()}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_of_scalar(value, damaged) for value in scalar.values]
    return scalar.as_py()


ROWS: dict[str, Callable[[Path, BinaryIO, int | None], Iterator[Row]]] = {"csv": _rows_of_csv, "tsv": _rows_of_tsv}

FORMATS: dict[str, Format] = {
    "json": Format(_items_of_json, _parse_object, "record"),
    "jsonl": Format(_items_of_jsonl, _parse_jsonl, "line"),
    **{name: Format(_items_of_table(rows), _parse_object, "line") for name, rows in ROWS.items()},
    "parquet": Format(_items_of_parquet, _parse_object, "record"),
}
