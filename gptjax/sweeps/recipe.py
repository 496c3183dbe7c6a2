"""A config written as a recipe that `train --config=` reads. Knows configs only."""

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
    """A Python file whose `get_config` gives this config, whatever becomes of the recipe that it came from.

    Args:
      config: not resolved: keys that follow from others do so still.
      title: what it is.
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
            lines.append(f"    {name}.{key} = {_written(section, key, value)}{mark}")
    return lines


def _written(section: ConfigDict, key: str, value: Any) -> str:
    """A value's text; of one that may be None, a placeholder of its type."""
    kind = section.get_type(key)
    return f"placeholder({kind.__name__})" if value is None and kind is not type(None) else repr(value)
