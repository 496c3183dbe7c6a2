"""Writes a config as a recipe for `train --config=`."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

HEAD = '''"""{title}"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
'''


def as_recipe(config: ConfigDict, title: str, marked: Collection[str]) -> str:
    """Formats a Python file whose `get_config` returns this config, independent of its original recipe.

    Args:
      config: not resolved, so that derived keys stay derived.
      title: docstring of the file.
      marked: keys that are marked as swept.
    """
    return HEAD.format(title=title) + "\n".join([*_lines(config, "config", "", marked), "    return config"]) + "\n"


def _lines(section: ConfigDict, name: str, prefix: str, marked: Collection[str]) -> list[str]:
    lines = []
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            lines += [f"    {name}.{key} = ConfigDict()", *_lines(value, f"{name}.{key}", f"{prefix}{key}.", marked)]
        else:
            mark = "  # swept" if prefix + key in marked else ""
            lines.append(f"    {name}.{key} = {_format_value(section, key, value)}{mark}")
    return lines


def _format_value(section: ConfigDict, key: str, value: Any) -> str:
    """Formats a value; None in a key with a type becomes a placeholder."""
    kind = section.get_type(key)
    return f"placeholder({kind.__name__})" if value is None and kind is not type(None) else repr(value)
