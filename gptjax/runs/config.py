"""The config of a run: all its keys, read from recipes, resolved, checked, saved and compared.

The keys are those that the parts of a run declare (gptjax.runs.options and what it imports).
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import did_you_mean, flatten, is_foreign, is_weighted_path, options, recipes
from gptjax.config.errors import ConfigError
from gptjax.data import options as data_options
from gptjax.finetune import options as finetune_options
from gptjax.models import options as model_options
from gptjax.optim import optimizers
from gptjax.runs import options as run_options
from gptjax.runs.options import RunOptions

SCHEMA = options.flat_options(RunOptions)
# The values that keys may have that name something.
CHOICES = {key: declared.choices for key, declared in SCHEMA.items() if declared.choices is not None}
# Keys that may change on resume, for all steps or for the remaining ones.
MUTABLE = {key for key, declared in SCHEMA.items() if declared.resumes != "never"}
# Keys in the config of a run that was imported, not trained.
IMPORTED = ("seed", "init_from", "data.tokenizer", "data.context", "finetune.method", "train.objective", "train.dtype")


def defaults() -> ConfigDict:
    """Returns the config of the base recipe."""
    return options.defaults(RunOptions)


def read(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Returns the locked config of a recipe with overrides from the command line; see gptjax.config.recipes.read."""
    return recipes.read(recipe, overrides, SCHEMA)


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a locked copy with absolute local paths and derived values filled in.

    `model.vocabulary` stays None until the tokenizer is known.

    Raises:
      ConfigError: a value of the wrong type, or a number out of range.
    """
    config = config.copy_and_resolve_references()
    for problem in options.problems(SCHEMA, flatten(config)):
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


def _absolute_origin(init_from: str) -> str:
    if not is_foreign(init_from):
        return _absolute(init_from)
    name = init_from.removeprefix("hf:")
    is_path = name.startswith((".", "/", "~")) or os.path.isdir(name)  # else it is a name on the hub
    return f"hf:{_absolute(name)}" if is_path else init_from


def check(config: ConfigDict, more: Iterable[str] = ()) -> None:
    """Raises ConfigError for the first problem of a resolved config.

    Args:
      config: to check, without data and devices.
      more: problems that other packages find, evaluated if there is none here.
    """
    for problem in itertools.chain(problems(config), more):
        raise ConfigError(problem)


def problems(config: ConfigDict) -> Iterator[str]:
    """Yields the problems of a resolved config, each in one line."""
    flat = flatten(config)
    yield from options.bound_problems(SCHEMA, flat)
    yield from model_options.problems(config.model)
    yield from data_options.problems(config)
    yield from optimizers.problems(config)
    yield from finetune_options.problems(config)
    yield from run_options.problems(config)
    yield from unknown_choices(flat)


def unknown_choices(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields unknown choices."""
    for key, names in CHOICES.items():
        for chosen in flat[key] if isinstance(flat[key], tuple) else [flat[key]]:
            if not isinstance(chosen, str) or chosen not in names:
                yield f"{key} has no choice {chosen!r}{did_you_mean(str(chosen), names)}"


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
    for problem in run_problems(flatten(config)):
        raise ValueError(problem)
    return config.lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def run_problems(flat: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of the flat config of a run, which may be an imported one."""
    yield from options.problems(SCHEMA, flat)
    for key in SCHEMA:
        if key.startswith(("model.", "objective.", *IMPORTED)) and key not in flat:
            yield f"it lacks {key}"


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
        if there.get(key) != here.get(key) and key not in MUTABLE
    ]
