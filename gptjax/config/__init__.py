"""Reads configs from recipes and the command line, resolves, saves and compares them.

The keys and their meanings are in configs/base.py; gptjax.config.checks has the constraints between them. Reads no data
and uses no device.
"""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import keys
from gptjax.config.errors import ConfigError, UserError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config or dictionary to {"model.layers": 4, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the locked config of a recipe with overrides from the command line.

    Args:
      recipe: path of a Python file with `get_config`, optionally with a colon and its argument, as in
        `configs/gpt2.py:medium`.
      overrides: flags such as `--config.model.layers=6`.

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
        check_recipe(plain, recipe)
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


def check_recipe(config: Any, recipe: str) -> None:
    """Raises ConfigError unless a recipe returns a config with exactly the keys of configs/base.py."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{recipe}: get_config returns {type(config).__name__}, not a config; start from configs/base.py"
        )
    flat = flatten(config)
    lacking, surplus = keys.KINDS.keys() - flat.keys(), [key for key in flat if key not in keys.KINDS]
    for problem in keys.problems(flat):
        raise ConfigError(f"{recipe}: {problem}")
    if surplus:
        raise ConfigError(f"{recipe}: unknown key {surplus[0]}{did_you_mean(surplus[0], keys.KINDS)}")
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


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a locked copy with absolute local paths and derived values filled in.

    `model.vocabulary` stays None until the tokenizer is known.

    Raises:
      ConfigError: a value of the wrong type, or a number out of range.
    """
    config = config.copy_and_resolve_references()
    for problem in keys.problems(flatten(config)):
        raise ConfigError(problem)
    with config.unlocked():
        model = config.model
        model.kv_heads = model.kv_heads or model.heads
        if model.arch == "seq2seq":
            model.encoder_layers = model.encoder_layers or model.layers
        model.head_width = model.head_width or model.width // max(model.heads, 1)
        # 2/3 of the ungated size, rounded up to a multiple of 8, since a gated MLP has three matrices instead of two.
        gated = "glu" in model.activation
        model.mlp_width = model.mlp_width or (-(-model.width // 3) * 8 if gated else 4 * model.width)
        if model.parametrization == "mup" and model.attention_scale is None and model.base_head_width:
            # muP scales by 1 / head_width instead of its root (arXiv 2203.03466, definition 4.1).
            same = model.base_head_width == model.head_width
            model.attention_scale = None if same else math.sqrt(model.base_head_width) / model.head_width
        model.qkv_bias = model.use_bias if model.qkv_bias is None else model.qkv_bias
        model.windows, model.suppress_tokens = tuple(model.windows), tuple(model.suppress_tokens)
        config.data.stages = tuple(config.data.stages)
        config.data.languages = tuple(config.data.languages)
        config.data.columns = tuple(config.data.columns)
        config.data.examples.labels = tuple(map(str, config.data.examples.labels))
        config.data.examples.fields = tuple(config.data.examples.fields)
        config.log.writers = tuple(config.log.writers)
        config.log.profile_steps = tuple(config.log.profile_steps)
        config.schedule.decay_steps = config.schedule.decay_steps or config.train.steps
        config.data.context = config.data.context or config.model.context
        if config.data.path and "://" not in config.data.path:
            config.data.path = _absolute(config.data.path)
        if config.data.path or config.data.mixture:
            config.data.source = "text" if config.data.source == "stdlib" else config.data.source
        config.data.mixture = tuple(
            (_absolute(one[0]), one[1]) if is_weighted_path(one) else one for one in config.data.mixture
        )
        if config.init_from:
            config.init_from = _absolute_origin(config.init_from)
        if config.objective.teacher:
            config.objective.teacher = _absolute(config.objective.teacher)
    return config.lock()


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def is_foreign(init_from: str) -> bool:
    """Returns True if a `config.init_from` names a Hugging Face model instead of a run."""
    return init_from.startswith("hf:")


def _absolute_origin(init_from: str) -> str:
    if not is_foreign(init_from):
        return _absolute(init_from)
    name = init_from.removeprefix("hf:")
    is_path = name.startswith((".", "/", "~")) or os.path.isdir(name)  # else it is a name on the hub
    return f"hf:{_absolute(name)}" if is_path else init_from


def is_weighted_path(one: Any) -> bool:
    """Returns True for a pair such as ("path", 0.7)."""
    return isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)


def with_vocabulary(config: ConfigDict, size: int) -> ConfigDict:
    """Returns the config with `model.vocabulary` filled in for a tokenizer with `size` ids.

    Raises:
      ConfigError: it is already set, to less than `size`.
    """
    vocabulary = config.model.vocabulary or size
    if vocabulary < size:
        raise ConfigError(
            f"model.vocabulary={vocabulary} is smaller than the tokenizer's {size} ({config.data.tokenizer})"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.vocabulary = vocabulary
    return config.lock()


def to_json(config: ConfigDict) -> str:
    """Returns the config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Returns the locked config of a text written by `to_json`.

    Raises:
      ValueError: the text is not valid JSON, or not a valid config.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    config = ConfigDict(_with_tuples(content))
    for problem in keys.run_problems(flatten(config)):
        raise ValueError(problem)
    return config.lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# Keys that may change on resume, since they do not affect the final parameters.
MUTABLE = ("log.", "mesh.", "checkpoint.", "eval.", "sample.", "data.prefetch", "train.hang_minutes")
# Keys that may change for the remaining steps; gptjax.runs.directory records the change.
MUTABLE_FROM_HERE = ("data.mixture", "data.temperature")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns ["model.layers (4 there, 6 here)", ...] for changed keys that a resumed run cannot change.

    A `model.vocabulary` of None in `new` matches any.
    """
    there, here = flatten(old), flatten(new)
    if here.get("model.vocabulary") is None:
        here["model.vocabulary"] = there.get("model.vocabulary")
    return [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(MUTABLE + MUTABLE_FROM_HERE)
    ]
