"""Configs: read from a recipe and the command line, checked, resolved, saved and compared.

The keys and their meanings are in configs/base.py; what is impossible together is gptjax.config.checks' part. Reads
no data and touches no device.
"""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import keys
from gptjax.config.errors import ConfigError, UserError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.layers": 4, ...} from a nested config or dictionary."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a recipe with the command line's changes, locked.

    Args:
      recipe: path of a Python file with `get_config`, and after a colon its argument: `configs/gpt2.py:medium`.
      overrides: flags such as `--config.model.layers=6`.

    Raises:
      ConfigError: no such file, it fails, a key it does not have, or a value of another type.
    """
    from absl import flags

    path = Path(recipe.split(":", 1)[0])
    if path.suffix != ".py" or not path.is_file():
        why = "is no file of Python" if path.exists() else "does not exist"
        raise ConfigError(f"there is no recipe {path}: it {why}; configs/base.py is one")
    sys.path.append(str(_home_of(path.resolve())))
    try:
        plain = _parse([f"--config={recipe}"])
        check_recipe(plain, recipe)
        check_keys(overrides, flatten(plain))
        return _parse([f"--config={recipe}", *overrides])
    except (UserError, KeyboardInterrupt):
        raise
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except BaseException as error:  # whatever a recipe raises, SystemExit too
        line = " ".join(str(error).split())
        raise ConfigError(f"{recipe}: {type(error).__name__}: {line[:300]}") from error
    finally:
        sys.path.pop()


def check_recipe(config: Any, recipe: str) -> None:
    """Raises ConfigError unless a recipe gives a config with the keys of configs/base.py and no others."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{recipe}: get_config gives no config but {type(config).__name__}; begin with configs/base.py"
        )
    flat = flatten(config)
    lacking, surplus = keys.KINDS.keys() - flat.keys(), [key for key in flat if key not in keys.KINDS]
    for problem in keys.problems(flat):
        raise ConfigError(f"{recipe}: {problem}")
    if surplus:
        raise ConfigError(f"{recipe}: unknown key {surplus[0]}{did_you_mean(surplus[0], keys.KINDS)}")
    if lacking:
        raise ConfigError(f"{recipe}: its config lacks {min(lacking)}; begin with configs/base.py")


def _home_of(recipe: Path) -> Path:
    """Where a recipe's `from configs import base` finds that, whatever folder below it the recipe lies in."""
    return next((folder for folder in recipe.parents if (folder / "configs").is_dir()), recipe.parent.parent)


def _parse(arguments: Sequence[str]) -> ConfigDict:
    from absl import flags
    from ml_collections import config_flags

    sys.modules.pop("config_config", None)  # else a recipe read before shows through where this one lacks a name
    argv = ["gptjax", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def check_keys(overrides: Sequence[str], known: dict[str, Any]) -> None:
    """Raises ConfigError for a `--config.KEY` that is not known, with the nearest one that is."""
    for flag in overrides:
        match = re.match(r"--(?:no)?config\.([^=]+)", flag)
        if not match:
            raise ConfigError(f"unknown flag {flag}; a config's keys are set with --config.KEY=VALUE")
        key = match[1]
        if key in known:
            continue
        if any(name.startswith(key + ".") for name in known):
            raise ConfigError(f"{key} holds other keys; set one of them, such as --config.{_first(key, known)}=...")
        raise ConfigError(f"unknown key {key}{did_you_mean(key, known)}")


def _first(section: str, known: dict[str, Any]) -> str:
    return next(name for name in known if name.startswith(section + "."))


def pick(table: Mapping[str, Any], name: str, what: str) -> Any:
    """`table[name]`, whatever its case.

    Args:
      table: what there is.
      name: what was asked for.
      what: of the thing, for the message.

    Raises:
      ConfigError: no such name; tells what there is.
    """
    if name.lower() not in table:
        raise ConfigError(f"{what} has no {name!r}; there are {', '.join(table)}")
    return table[name.lower()]


def did_you_mean(name: str, known: Any) -> str:
    """ "; did you mean X?" for the nearest known name, or the whole list where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if len(known) < 12 else ""


def resolve(config: ConfigDict) -> ConfigDict:
    """A locked copy in which what follows from other keys is filled in, and local paths are absolute.

    `model.vocabulary` stays None until the tokenizer is there.

    Raises:
      ConfigError: a value of another type than its key has, or a number that cannot be.
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
        # Two thirds, to the next multiple of 8, of what is not gated: a gated MLP has three matrices instead of two.
        gated = "glu" in model.activation
        model.mlp_width = model.mlp_width or (-(-model.width // 3) * 8 if gated else 4 * model.width)
        if model.parametrization == "mup" and model.attention_scale is None and model.base_head_width:
            # Of query-key products: falls as the head's width, not as its root (arXiv 2203.03466, definition 4.1).
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
    """Whether a `config.init_from` names a Hugging Face model, and no run."""
    return init_from.startswith("hf:")


def _absolute_origin(init_from: str) -> str:
    if not is_foreign(init_from):
        return _absolute(init_from)
    name = init_from.removeprefix("hf:")
    is_path = name.startswith((".", "/", "~")) or os.path.isdir(name)  # else it is a name on the hub
    return f"hf:{_absolute(name)}" if is_path else init_from


def is_weighted_path(one: Any) -> bool:
    """Whether it is like ("path", 0.7)."""
    return isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)


def with_vocabulary(config: ConfigDict, size: int) -> ConfigDict:
    """The config with `model.vocabulary` filled in for a tokenizer of that many ids.

    Raises:
      ConfigError: it is set, and smaller than the tokenizer's.
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
    """The config as indented JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config that `to_json` wrote.

    Raises:
      ValueError: it is another text, or was changed into what no config is.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    config = ConfigDict(_with_tuples(found))
    for problem in keys.run_problems(flatten(config)):
        raise ValueError(problem)
    return config.lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# What does not change which parameters a run ends with may differ when it goes on.
FREE = ("log.", "mesh.", "checkpoint.", "eval.", "sample.", "data.prefetch", "train.hang_minutes")
# What may change for the steps that are left, and is written down (gptjax.runs.directory).
FREE_FROM_HERE = ("data.mixture", "data.temperature")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """["model.layers (4 there, 6 here)", ...] for the keys that a run cannot change when it goes on.

    A `model.vocabulary` of None in `new` agrees with any.
    """
    there, here = flatten(old), flatten(new)
    if here.get("model.vocabulary") is None:
        here["model.vocabulary"] = there.get("model.vocabulary")
    return [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not key.startswith(FREE + FREE_FROM_HERE)
    ]
