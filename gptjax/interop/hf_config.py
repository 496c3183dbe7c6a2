"""Keys of a `config.json`: kinds of values, transformers' defaults where one is absent, switches that gptjax lacks.

Each family has a table of the keys that decide what it computes. Keys that transformers' class has and that are in no
table change nothing here, which a test holds against that class; other keys transformers does not read either.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config.errors import DataError


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      default: transformers' value where the key is absent.
      kind: of KINDS.
      null: whether null may stand there.
      only: whether gptjax has nothing but the default.
    """

    default: Any
    kind: str
    null: bool = False
    only: bool = False


class Kind(NamedTuple):
    """Values that a key may have.

    Attributes:
      words: for messages.
      has: whether a value is one of them; numbers are finite.
      most: the largest number.
    """

    words: str
    has: Callable[[Any], bool]
    most: float = math.inf


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond floats
        return False


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(one, kind) for one in value)


KINDS = {
    "size": Kind("a whole number from 1", lambda x: _is_whole(x) and x >= 1, 2**31 - 1),  # of a tensor's axis
    "layers": Kind("a whole number from 1", lambda x: _is_whole(x) and x >= 1, 10_000),
    "count": Kind("a whole number from 1", lambda x: _is_whole(x) and x >= 1, 2**31 - 1),
    "index": Kind("a whole number from 0", lambda x: _is_whole(x) and x >= 0, 2**31 - 1),
    "number": Kind("a number from 0", lambda x: _is_number(x) and x >= 0),
    "positive": Kind("a number more than 0", lambda x: _is_number(x) and x > 0),
    "flag": Kind("true or false", lambda x: type(x) is bool),
    "name": Kind("a text", lambda x: isinstance(x, str)),
    "names": Kind("a list of texts", _is_list_of(str)),
    "lists": Kind("a list of lists", _is_list_of(list)),
    "object": Kind("an object", lambda x: isinstance(x, dict)),
    "any": Kind("anything", lambda x: True),
}


def key(kind: str, default: Any, null: bool = False) -> Key:
    """A key that is read; null may stand where transformers' default is null."""
    return Key(default, kind, null or default is None)


def only(default: Any) -> Key:
    """A switch that gptjax does not have: any other value than transformers' default is refused."""
    return Key(default, "any", only=True)


# Of every family: what transformers reads beside the family's own class.
COMMON = {"quantization_config": only(None), "per_layer_config": only(None), "pruned_heads": only({})}


def read(
    config: Mapping[str, Any],
    keys: Mapping[str, Key],
    most: Mapping[str, int] = {},
    where: str = "config.json",
) -> dict[str, Any]:
    """A config with the defaults of its absent keys.

    Args:
      config: content of a `config.json`, or an object in it.
      keys: that are read.
      most: the largest number of a kind, where it is less than KINDS has.
      where: the object's name, for messages.

    Raises:
      DataError: a value of another kind, or a switch that gptjax does not have.
    """
    for name in keys.keys() & config.keys():
        value, (default, kind, null, is_only) = config[name], keys[name]
        if is_only and value != default:
            raise DataError(f"{where}: {name}={short(value)} is not supported, only {default}")
        if is_only or (value is None and null):
            continue
        if not KINDS[kind].has(value):
            written = repr(value) if isinstance(value, str) else value
            raise DataError(f"{where}: {name} is {short(written)}; it must be {KINDS[kind].words}")
        limit = min(KINDS[kind].most, most.get(kind, math.inf))
        if limit < math.inf and value > limit:
            raise DataError(f"{where}: {name} is {short(value)}, more than the {limit:,} that there can be")
    return filled(config, keys)


def filled(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """A config with the defaults of its absent keys, its values as they are."""
    return {name: one.default for name, one in keys.items()} | dict(config)


def lacking(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The sizes that a config does not name, and transformers' defaults of them."""
    sizes = {name: one.default for name, one in keys.items() if one.kind in ("size", "layers") and not one.null}
    return {name: default for name, default in sizes.items() if name not in config}


def short(value: Any) -> str:
    """A value in a line: its first letters."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."
