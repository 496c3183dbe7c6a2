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
    """The prompts of a file, in order; at its end it is said how many were repaired.

    Args:
      place: a file of records by its name (.json, .csv, .tsv, .parquet), or of lines; "-": lines of stdin. A line is a
        prompt as it is, a string of JSON, or an object of JSON with a text `prompt`. Only line feeds end lines.

    Raises:
      ConfigError: what reads it is not installed.
      DataError: it cannot be read, or an object has no text `prompt`.
    """
    format = "" if place == "-" else streams.suffix_of(Path(place))
    if format in records.FORMATS and format != "jsonl":
        return (_of_object(record.fields, record.where) for record in records.read(Path(place)))
    return _of_lines(place, strict=format == "jsonl")


def _of_lines(place: str, strict: bool) -> Iterator[str]:
    count = damaged = 0
    for number, line in _lines(place):
        text, repaired = decode_lossy(line)
        text = streams.strip_newline(text)
        if text.strip():
            prompt, mended = _of_line(text, f"{'stdin' if place == '-' else place}, line {number:,}", strict)
            count, damaged = count + 1, damaged + (repaired or mended)
            yield prompt
    if damaged:
        console.say(f"prompts    {damaged:,} of {count:,} of {place} are not UTF-8 and are repaired with U+FFFD")


def _lines(place: str) -> Iterator[tuple[int, bytes]]:
    if place != "-":
        with streams.open_stream(Path(place)) as (_, stream):
            yield from streams.lines(Path(place), stream)
        return
    stdin: BinaryIO | None = getattr(sys.stdin, "buffer", None)  # bytes, whatever the locale is
    yield from streams.lines(Path("stdin"), stdin or io.BytesIO(sys.stdin.read().encode("utf-8", "surrogatepass")))


def _of_line(line: str, where: str, strict: bool) -> tuple[str, bool]:
    """A line's prompt, and whether it was repaired; with `strict` what begins as a string or an object must be one."""
    if not line.lstrip().startswith(("{", '"')):
        return line, False
    try:
        value, mended = records.parse_repaired(line, where)
    except DataError:
        if strict or is_too_deep(line):
            raise
        return line, False
    return value if isinstance(value, str) else _of_object(value, where), mended


def _of_object(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{where} has no text 'prompt'; it has {', '.join(map(str, value)) or 'nothing'}")
    return prompt
