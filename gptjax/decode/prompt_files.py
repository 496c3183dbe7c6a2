"""Files of prompts: one a line, or records with a field `prompt`. Text out, nothing of tokens."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config.errors import DataError
from gptjax.core import console
from gptjax.core.files import decode_lossy, is_too_deep
from gptjax.data import records, streams


def read(place: str) -> Iterator[str]:
    """Yields the prompts of a file, in order; reports at the end how many were repaired.

    Args:
      place: a file of records by its suffix (.json, .csv, .tsv, .parquet), or of lines; "-" for lines of stdin. A line
        is a plain prompt, a JSON string, or a JSON object with a string `prompt`. Only line feeds end lines.

    Raises:
      ConfigError: a package that is needed to read the file is not installed.
      DataError: the file cannot be read, or an object has no string `prompt`.
    """
    format = "" if place == "-" else streams.suffix_of(Path(place))
    if format in records.FORMATS and format != "jsonl":
        return (_parse_object(record.fields, record.where) for record in records.read(Path(place)))
    return _read_lines(place, strict=format == "jsonl")


def _read_lines(place: str, strict: bool) -> Iterator[str]:
    count = n_repaired = 0
    for number, line in _lines(place):
        text, in_bytes = decode_lossy(line)
        text = streams.strip_newline(text)
        if text.strip():
            prompt, in_json = _parse_line(text, f"{'stdin' if place == '-' else place}, line {number:,}", strict)
            count, n_repaired = count + 1, n_repaired + (in_bytes or in_json)
            yield prompt
    if n_repaired:
        console.say(f"prompts    {n_repaired:,} of {count:,} of {place} are not UTF-8 and are repaired with U+FFFD")


def _lines(place: str) -> Iterator[tuple[int, bytes]]:
    if place != "-":
        with streams.open_stream(Path(place)) as (_, stream):
            yield from streams.lines(Path(place), stream)
        return
    stdin: BinaryIO | None = getattr(sys.stdin, "buffer", None)  # bytes, whatever the locale is
    yield from streams.lines(Path("stdin"), stdin or io.BytesIO(sys.stdin.read().encode("utf-8", "surrogatepass")))


def _parse_line(line: str, where: str, strict: bool) -> tuple[str, bool]:
    """Returns a line's prompt and True if it was repaired; with `strict`, what begins like JSON must be JSON."""
    if not line.lstrip().startswith(("{", '"')):
        return line, False
    try:
        value, repaired = records.parse_repaired(line, where)
    except DataError:
        if strict or is_too_deep(line):
            raise
        return line, False
    return value if isinstance(value, str) else _parse_object(value, where), repaired


def _parse_object(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{where} has no text 'prompt'; it has {', '.join(map(str, value)) or 'nothing'}")
    return prompt
