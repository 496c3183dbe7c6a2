"""Configs as nested dictionaries: flat keys, names that are near, and what a recipe's path means.

gptjax.config.options declares keys, gptjax.config.recipes reads recipes, gptjax.runs.config has the keys of a run.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gptjax.config.errors import ConfigError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config or dictionary to {"model.layers": 4, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    """Returns `table[name]`, ignoring case.

    Args:
      table: values by name.
      name: the name.
      what: description of the table, for the message.

    Raises:
      ConfigError: unknown name; the message lists the known ones.
    """
    if name.lower() not in table:
        raise ConfigError(f"{what} has no {name!r}; there are {', '.join(table)}")
    return table[name.lower()]


def did_you_mean(name: str, names: Any) -> str:
    """Returns "; did you mean X?" for the nearest known name, or a list of all if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if len(names) < 12 else ""


def is_foreign(init_from: str) -> bool:
    """Returns True if a `config.init_from` names a Hugging Face model instead of a run."""
    return init_from.startswith("hf:")


def is_weighted_path(one: Any) -> bool:
    """Returns True for a pair such as ("path", 0.7)."""
    return isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)
