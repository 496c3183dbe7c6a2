"""Keys of a `config.json`: types of values, transformers' defaults, and options that gptjax does not support.

Each family has a table of the keys that affect its computation. A test compares the tables with transformers' classes:
a key that is in none has no effect here, and transformers ignores all others, too.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config.errors import DataError


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      default: transformers' value if the key is absent.
      kind: a key of KINDS.
      nullable: the value may be null.
      fixed: gptjax supports only the default.
    """

    default: Any
    kind: str
    nullable: bool = False
    fixed: bool = False


class Kind(NamedTuple):
    """A type of values.

    Attributes:
      description: for messages.
      accepts: predicate of its values; numbers must be finite.
      maximum: the largest number.
    """

    description: str
    accepts: Callable[[Any], bool]
    maximum: float = math.inf


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(one, kind) for one in value)


KINDS = {
    "size": Kind("a whole number from 1", lambda x: _is_whole(x) and x >= 1, 2**31 - 1),  # the size of a tensor's axis
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
    """Returns a key that is read; null is allowed with `null` or if transformers' default is null."""
    return Key(default, kind, null or default is None)


def fixed(default: Any) -> Key:
    """Returns an unsupported option: any value other than transformers' default is refused."""
    return Key(default, "any", fixed=True)


# Keys of every family, which transformers reads in its base class.
COMMON = {"quantization_config": fixed(None), "per_layer_config": fixed(None), "pruned_heads": fixed({})}


def read(
    config: Mapping[str, Any],
    keys: Mapping[str, Key],
    maxima: Mapping[str, int] = {},
    where: str = "config.json",
) -> dict[str, Any]:
    """Checks a config and fills in the defaults of absent keys.

    Args:
      config: content of a `config.json`, or an object in it.
      keys: keys to read.
      maxima: the largest number of a kind, if it is less than in KINDS.
      where: name of the object, for messages.

    Raises:
      DataError: a value of the wrong type, or an unsupported option.
    """
    for name in keys.keys() & config.keys():
        value, (default, kind, nullable, is_fixed) = config[name], keys[name]
        if is_fixed and value != default:
            raise DataError(f"{where}: {name}={abbreviated(value)} is not supported, only {default}")
        if is_fixed or (value is None and nullable):
            continue
        if not KINDS[kind].accepts(value):
            written = repr(value) if isinstance(value, str) else value
            raise DataError(f"{where}: {name} is {abbreviated(written)}; it must be {KINDS[kind].description}")
        limit = min(KINDS[kind].maximum, maxima.get(kind, math.inf))
        if limit < math.inf and value > limit:
            raise DataError(f"{where}: {name} is {abbreviated(value)}, more than the {limit:,} that there can be")
    return with_defaults(config, keys)


def with_defaults(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Fills in the defaults of absent keys without checking values."""
    return {name: one.default for name, one in keys.items()} | dict(config)


def missing_sizes(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Returns the sizes that a config lacks, with transformers' defaults."""
    sizes = {name: one.default for name, one in keys.items() if one.kind in ("size", "layers") and not one.nullable}
    return {name: default for name, default in sizes.items() if name not in config}


def abbreviated(value: Any) -> str:
    """Formats a value for a message: one line of at most 40 letters."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."
