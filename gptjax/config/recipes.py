"""Reads configs from recipes, Python files with a function `get_config`, and from flags."""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import did_you_mean, flatten
from gptjax.config.errors import ConfigError, UserError
from gptjax.config.options import Option, problems


def read(recipe: str, overrides: Sequence[str], schema: Mapping[str, Option]) -> ConfigDict:
    """Returns the locked config of a recipe with overrides from the command line.

    Args:
      recipe: path of a Python file with `get_config`, optionally with a colon and its argument, as in
        `configs/gpt2.py:medium`.
      overrides: flags such as `--config.model.layers=6`.
      schema: all keys of a config.

    Raises:
      ConfigError: the file is missing or fails, a key is unknown, or a value has the wrong type.
    """
    from absl import flags

    path = Path(recipe.split(":", 1)[0])
    if path.suffix != ".py" or not path.is_file():
        why = "is not a Python file" if path.exists() else "does not exist"
        raise ConfigError(f"there is no recipe {path}: it {why}; configs/base.py is one")
    sys.path.append(str(_import_root(path.resolve())))
    try:
        plain = _parse([f"--config={recipe}"])
        check_recipe(plain, recipe, schema)
        check_keys(overrides, flatten(plain))
        return _parse([f"--config={recipe}", *overrides])
    except (UserError, KeyboardInterrupt):
        raise
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except BaseException as error:  # a recipe may raise anything, including SystemExit
        line = " ".join(str(error).split())
        raise ConfigError(f"{recipe}: {type(error).__name__}: {line[:300]}") from error
    finally:
        sys.path.pop()


def check_recipe(config: Any, recipe: str, schema: Mapping[str, Option]) -> None:
    """Raises ConfigError unless a recipe returns a config with exactly the keys of a schema."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{recipe}: get_config returns {type(config).__name__}, not a config; start from configs/base.py"
        )
    flat = flatten(config)
    lacking, surplus = schema.keys() - flat.keys(), [key for key in flat if key not in schema]
    for problem in problems(schema, flat):
        raise ConfigError(f"{recipe}: {problem}")
    if surplus:
        raise ConfigError(f"{recipe}: unknown key {surplus[0]}{did_you_mean(surplus[0], schema)}")
    if lacking:
        raise ConfigError(f"{recipe}: its config lacks {min(lacking)}; start from configs/base.py")


def _import_root(recipe: Path) -> Path:
    """Returns the directory that a recipe's `from configs import base` is resolved in."""
    return next((folder for folder in recipe.parents if (folder / "configs").is_dir()), recipe.parent.parent)


def _parse(arguments: Sequence[str]) -> ConfigDict:
    from absl import flags
    from ml_collections import config_flags

    sys.modules.pop("config_config", None)  # else names of a previous recipe remain visible
    argv = ["gptjax", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def check_keys(overrides: Sequence[str], names: Collection[str]) -> None:
    """Raises ConfigError, with the nearest known key, for an unknown `--config.KEY`."""
    for flag in overrides:
        match = re.match(r"--(?:no)?config\.([^=]+)", flag)
        if not match:
            raise ConfigError(f"unknown flag {flag}; a config's keys are set with --config.KEY=VALUE")
        key = match[1]
        if key in names:
            continue
        if any(name.startswith(key + ".") for name in names):
            raise ConfigError(f"{key} holds other keys; set one of them, such as --config.{_first(key, names)}=...")
        raise ConfigError(f"unknown key {key}{did_you_mean(key, names)}")


def _first(section: str, names: Collection[str]) -> str:
    return next(name for name in names if name.startswith(section + "."))
