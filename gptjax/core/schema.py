"""Schemas of JSON values, written as values of the same structure and checked when a file is read.

    {"step": int, "val/loss?": (float, None), "names": [str], "shares": {str: int}}

A schema is `str`, `bool`, `int` (64 bits), `float` (or an integer), `None`, `object` (anything), a list of one schema
for arrays, a `Row` of schemas for arrays of that length, a tuple of alternative schemas, or a dictionary: by name,
where a name that ends in `?` is optional and other names are allowed, or `{str: schema}` for any name.
"""

from pathlib import Path
from typing import Any

from gptjax.config.errors import DataError
from gptjax.core.files import parse_json, read_json, read_text

Schema = Any

NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    None: "null",
    dict: "an object",
}


class Row(tuple[Schema, ...]):
    """Schema of an array with a schema for each item."""

    def __new__(cls, *items: Schema) -> "Row":
        """The schemas in order."""
        return super().__new__(cls, items)


def read(path: Path, schema: Schema, finite: bool = True) -> dict[str, Any]:
    """Reads the object in a JSON file and checks it; `finite` is that of gptjax.core.files.parse_json.

    Raises:
      DataError: the file is missing, cannot be read, is not JSON, or does not match the schema.
    """
    value = read_json(path, finite)
    check(value, schema, f"{path} is damaged")
    return value


def read_lines(path: Path, schema: Schema) -> list[dict[str, Any]]:
    """Reads and checks the objects of a JSON lines file; returns none if there is no file.

    A last line without a newline was being written when the process was killed, and is ignored.

    Raises:
      DataError: the file cannot be read, or a line is not JSON or does not match the schema.
    """
    if not path.exists():
        return []
    lines = read_text(path).split("\n")[:-1]
    objects = []
    for number, line in enumerate(lines, 1):
        objects.append(parse_json(line, f"{path} is damaged: line {number}"))
        check(objects[-1], schema, f"{path} is damaged: line {number}")
    return objects


def check(value: Any, schema: Schema, where: str) -> None:
    """Raises DataError, `where: a.b[0] is ..., not ...`, for the first mismatch of a value."""
    problem = mismatch(value, schema)
    if problem:
        raise DataError(f"{where}: {problem}")


def mismatch(value: Any, schema: Schema, name: str = "") -> str:
    """Describes the first mismatch of a value with a schema; "" if it matches.

    Args:
      value: result of json.loads.
      schema: see above.
      name: name of the value, such as splits.train[0]; "" for the root.
    """
    if isinstance(schema, tuple) and not isinstance(schema, Row):
        problems = [mismatch(value, one, name) for one in schema]
        return "" if "" in problems else problems[0]
    children: list[tuple[Any, Schema, str]] = []
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return _is_not(value, "an object", name)
        for key, inner in schema.items():
            if key is str:
                children += [(one, inner, f"{name}.{child}") for child, one in value.items()]
            elif key.removesuffix("?") in value:
                children.append((value[key.removesuffix("?")], inner, f"{name}.{key.removesuffix('?')}"))
            elif not key.endswith("?"):
                return f"{name.lstrip('.') or 'it'} lacks {key}"
    elif isinstance(schema, list | Row):
        if not isinstance(value, list) or (isinstance(schema, Row) and len(value) != len(schema)):
            return _is_not(value, f"an array of {len(schema)}" if isinstance(schema, Row) else "an array", name)
        schemas = schema if isinstance(schema, Row) else schema * len(value)
        children = [(one, item, f"{name}[{i}]") for i, (one, item) in enumerate(zip(value, schemas, strict=True))]
    elif not _is_plain(value, schema):
        return _is_not(value, NAMES[schema], name)
    return next(filter(None, (mismatch(*child) for child in children)), "")


def _is_plain(value: Any, schema: Schema) -> bool:
    if schema is None or schema is object:
        return schema is object or value is None
    if schema is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if schema is float:
        return type(value) is float or _is_plain(value, int)
    return type(value) is schema


def _is_not(value: Any, expected: str, name: str) -> str:
    shown = "an object" if isinstance(value, dict) else "an array" if isinstance(value, list) else repr(value)
    return f"{name.lstrip('.') or 'it'} is {shown[:60]}, not {expected}"
