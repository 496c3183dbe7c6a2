"""Fields of records: templates, labels by name, numbers and multiple choices.

Only texts and numbers become text; ambiguous values are refused.
"""

import math
import re
from numbers import Integral, Real
from typing import Any

import numpy as np

from gptjax.config.errors import DataError
from gptjax.data.records import Record


def field(record: Record, name: str, key: str) -> Any:
    """Returns a field of a record; `key` is the config key that names it, for the message.

    Raises:
      DataError: the record lacks the field.
    """
    if name not in record.fields:
        available = ", ".join(map(str, record.fields)) or "none"
        raise DataError(
            f"{record.where}, has no field {name!r}, which data.examples.{key} asks for; it has {available}"
        )
    return record.fields[name]


def template_fields(template: str) -> list[str]:
    """Returns the names in braces of a template."""
    return re.findall(r"\{(\w+)\}", template)


def fill_template(template: str, record: Record, key: str) -> str:
    """Replaces the names in braces of a template by the fields; `key` is its config key, for the message.

    Raises:
      DataError: the record lacks a field, or the field is neither text nor a number.
    """

    def value(match: re.Match[str]) -> str:
        return as_text(field(record, match[1], key), record, match[1])

    return re.sub(r"\{(\w+)\}", value, template)


def as_text(value: Any, record: Record, name: str) -> str:
    """Returns a text as it is, or a number as JSON writes it.

    Raises:
      DataError: the value is anything else, such as true, null, a list, or a number that is not finite.
    """
    if isinstance(value, str):
        return value
    texts = spellings(value)
    if isinstance(value, bool | np.bool_) or not texts:
        number = isinstance(value, Real)
        problem = f"{value!r}, which is not finite" if number and not isinstance(value, bool) else type(value).__name__
        raise DataError(f"{record.where} has {name!r} that is {problem} and not text")
    return texts[0]


def spellings(value: Any) -> tuple[str, ...]:
    """Returns the spellings of a text, a number or a boolean; () for anything else."""
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
    """Returns the name of the label of a record.

    Raises:
      DataError: the record has no label, or one that is not in `options.labels`.
    """
    return match_label(field(record, options.label, "label"), record, options)


def match_label(label: Any, record: Record, options: Any) -> str:
    """Returns the entry of `options.labels` that a label spells; raises DataError if there is not exactly one."""
    matches = [name for name in spellings(label) if name in options.labels]
    if len(matches) > 1:
        raise DataError(f"{record.where} has the label {label!r}, which data.examples.labels names twice: {matches}")
    if not matches:
        names = ", ".join(map(str, options.labels))
        raise DataError(f"{record.where} has the label {label!r}, which data.examples.labels does not name: {names}")
    return matches[0]


def value_of(record: Record, c: Any) -> float:
    """Returns the label of a record as a number.

    Raises:
      DataError: the label is not a number, not finite, or too large for float32.
    """
    value = field(record, c.label, "label")
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        what = "too large" if number > 0 or number < 0 else "not a number"
        raise DataError(f"{record.where} has {c.label!r} that is {what}: {value!r}")
    return number


def choices_of(record: Record, c: Any) -> list[str]:
    """Returns the choices of a record, the list in its field `c.choices`.

    Raises:
      DataError: the field is not a list of at least two choices.
    """
    choices = field(record, c.choices, "choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{record.where} has {c.choices!r} that is not a list of choices")
    return [as_text(choice, record, c.choices) for choice in choices]


def choice_of(record: Record, c: Any) -> int:
    """Returns the index of the right choice, given as an index from 0, a letter from A, or its text.

    A label that is a number is an index if the choices are texts.

    Raises:
      DataError: the label is none of these, or is ambiguous.
    """
    label, choices = field(record, c.label, "label"), choices_of(record, c)
    numbers, letters = list(map(str, range(len(choices)))), [chr(ord("A") + i) for i in range(len(choices))]
    readings = {
        kind: names.index(spelling)
        for kind, names in (("number", numbers), ("letter", letters), ("text", choices))
        for spelling in spellings(label)
        if spelling in names
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
        meanings = " and ".join(f"the {kind} of choice {choice}" for kind, choice in readings.items())
        raise DataError(f"{record.where} has {c.label!r} that is ambiguous: {label!r} is {meanings}, counted from 0")
    return next(iter(readings.values()))
