"""Fields of records: texts by templates, labels by name, numbers, and which of several choices is right.

A value becomes text only where it is one, or a number; what could be read in two ways is refused.
"""

import math
import re
from numbers import Integral, Real
from typing import Any

import numpy as np

from gptjax.config.errors import DataError
from gptjax.data.records import Record


def field(record: Record, name: str, key: str) -> Any:
    """A field; `key`: of the config that asks for it, for the message.

    Raises:
      DataError: the record lacks it.
    """
    if name not in record.fields:
        there = ", ".join(map(str, record.fields)) or "none"
        raise DataError(f"{record.where}, has no field {name!r}, which data.examples.{key} asks for; it has {there}")
    return record.fields[name]


def template_fields(template: str) -> list[str]:
    """The fields that a template has in braces."""
    return re.findall(r"\{(\w+)\}", template)


def fill_template(template: str, record: Record, key: str) -> str:
    """The template with the fields in braces put in; `key`: of the config that it is, for the message.

    Raises:
      DataError: the record lacks one, or it is no text and no number.
    """

    def value(match: re.Match[str]) -> str:
        return as_text(field(record, match[1], key), record, match[1])

    return re.sub(r"\{(\w+)\}", value, template)


def as_text(value: Any, record: Record, name: str) -> str:
    """A text, or a number as JSON writes it.

    Raises:
      DataError: it is anything else, such as true, null, a list, or a number that is not finite.
    """
    if isinstance(value, str):
        return value
    text = spellings(value)
    if isinstance(value, bool | np.bool_) or not text:
        number = isinstance(value, Real)
        what = f"{value!r}, which is not finite" if number and not isinstance(value, bool) else type(value).__name__
        raise DataError(f"{record.where} has {name!r} that is {what} and not text")
    return text[0]


def spellings(value: Any) -> tuple[str, ...]:
    """How a text, a number or a truth value may be written where others name it; () for anything else."""
    match value:
        case str():
            return (value,)
        case bool() | np.bool_():
            return ("true", "True") if value else ("false", "False")
        case Integral():
            return (str(int(value)),)
        case Real() if math.isfinite(value):
            number = float(value)
            return (repr(number), *([str(int(number))] if number.is_integer() and abs(number) < 2**53 else []))
    return ()


def label_of(record: Record, options: Any) -> str:
    """The name of a record's label.

    Raises:
      DataError: there is none, or not one of `options.labels`.
    """
    return match_label(field(record, options.label, "label"), record, options)


def match_label(label: Any, record: Record, options: Any) -> str:
    """The one of `options.labels` that a label is, a number or truth value as it may be written; else DataError."""
    matches = [name for name in spellings(label) if name in options.labels]
    if len(matches) > 1:
        raise DataError(f"{record.where} has the label {label!r}, which data.examples.labels names twice: {matches}")
    if not matches:
        names = ", ".join(map(str, options.labels))
        raise DataError(f"{record.where} has the label {label!r}, which data.examples.labels does not name: {names}")
    return matches[0]


def value_of(record: Record, c: Any) -> float:
    """The number that its label is.

    Raises:
      DataError: it is none, not finite, or too large for float32.
    """
    value = field(record, c.label, "label")
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        what = "too large" if number > 0 or number < 0 else "no number"
        raise DataError(f"{record.where} has {c.label!r} that is {what}: {value!r}")
    return number


def choices_of(record: Record, c: Any) -> list[str]:
    """The choices of a record, in `choices`.

    Raises:
      DataError: they are no list.
    """
    choices = field(record, c.choices, "choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{record.where} has {c.choices!r} that is no list of choices")
    return [as_text(choice, record, c.choices) for choice in choices]


def choice_of(record: Record, c: Any) -> int:
    """Which choice is right: its number from 0, its letter from A, or its text.

    A number, which is no text, is the choice's number where choices are texts.

    Raises:
      DataError: none of these, or two of them that differ.
    """
    label, choices = field(record, c.label, "label"), choices_of(record, c)
    numbers, letters = list(map(str, range(len(choices)))), [chr(ord("A") + i) for i in range(len(choices))]
    readings = {
        what: names.index(spelt)
        for what, names in (("number", numbers), ("letter", letters), ("text", choices))
        for spelt in spellings(label)
        if spelt in names
    }
    if not readings:
        raise DataError(f"{record.where} has {c.label!r} that is none of its {len(choices)} choices: {label!r}")
    if (
        "number" in readings
        and not isinstance(label, str)
        and all(isinstance(choice, str) for choice in record.fields[c.choices])
    ):
        return readings["number"]
    if len(set(readings.values())) > 1:
        several = " and ".join(f"the {what} of choice {choice}" for what, choice in readings.items())
        raise DataError(f"{record.where} has {c.label!r} that is ambiguous: {label!r} is {several}, counted from 0")
    return next(iter(readings.values()))
