"""Configs: read from a recipe and the command line, checked, resolved, saved and compared.

The keys and their meanings are in configs/base.py. This file knows which values are impossible together and says so
in one line before anything is compiled; it reads no data and touches no device.
"""

import difflib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class UserError(Exception):
    """Something that the person at the keyboard can mend; a command prints it as one line and exits with code 2."""


class ConfigError(UserError):
    """A config, or a flag, that cannot be."""


class DataError(UserError):
    """Text that is missing or that cannot be used."""


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be read or written."""


class Diverged(Exception):
    """Training cannot go on for bad steps; a command prints it as one line and exits with code 3."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to leave; a command prints the message and exits with code 128 + the signal's number.

    Args:
      number: of the signal.
      message: for the person.
    """

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.number = number

    @classmethod
    def after(cls, error: KeyboardInterrupt, message: str) -> "Interrupted":
        """The same signal's, with a message."""
        return cls(error.number if isinstance(error, Interrupted) else signal.SIGINT, message)


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
    if not path.is_file():
        raise ConfigError(f"there is no recipe {path}; configs/base.py is one")
    sys.path.append(str(_home_of(path.resolve())))
    try:
        check_keys(overrides, flatten(_parse([f"--config={recipe}"])))
        return _parse([f"--config={recipe}", *overrides])
    except UserError:
        raise
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever a recipe raises
        line = " ".join(str(error).split())
        raise ConfigError(f"{recipe}: {type(error).__name__}: {line[:300]}") from error
    finally:
        sys.path.pop()


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
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        model = config.model
        model.kv_heads = model.kv_heads or model.heads
        if model.arch == "seq2seq":
            model.encoder_layers = model.encoder_layers or model.layers
        model.head_width = model.head_width or model.width // max(model.heads, 1)
        # Two thirds, to the next multiple of 8, of what is not gated: a gated MLP has three matrices instead of two.
        gated = "glu" in model.activation
        model.mlp_width = model.mlp_width or (-(-model.width // 3) * 8 if gated else 4 * model.width)
        model.qkv_bias = model.use_bias if model.qkv_bias is None else model.qkv_bias
        model.windows, model.never = tuple(model.windows), tuple(model.never)
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
            (_absolute(one[0]), one[1]) if _is_weighted_path(one) else one for one in config.data.mixture
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


def _is_weighted_path(one: Any) -> bool:
    return isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str)


Choices = Mapping[str, Mapping[str, Any]]


def check(config: ConfigDict, choices: Choices, more: Iterable[str] = ()) -> None:
    """Raises ConfigError for the first value that cannot be.

    Args:
      config: resolved.
      choices: what each key that names something may name.
      more: problems that others see, one line each; asked for where there is none here.
    """
    for problem in itertools.chain(_problems(config, choices), more):
        raise ConfigError(problem)


def _problems(config: ConfigDict, choices: Choices) -> Iterator[str]:
    for key, value in flatten(config).items():
        if type(value) in (int, float) and not key.startswith(("mesh.", "seed")) and value < 0:
            yield f"{key} is {value}; it cannot be negative"
    model, data, train = config.model, config.data, config.train
    sizes = "layers heads kv_heads head_width width context mlp_width experts experts_per_token "
    sizes += "norm_epsilon init_std labels embedding_scale logit_scale"
    positive = {f"model.{key}": model[key] for key in sizes.split()}
    positive |= {} if model.encoder_layers is None else {"model.encoder_layers": model.encoder_layers}
    positive |= {"data.batch_size": data.batch_size, "data.context": data.context, "train.steps": train.steps}
    positive |= {"train.grad_accumulation": train.grad_accumulation, "eval.batches": config.eval.batches}
    positive |= {f"{part}.every_steps": config[part].every_steps for part in ("eval", "log")}
    positive |= {"checkpoint.keep": config.checkpoint.keep, "guard.patience": config.guard.patience}
    positive |= {"optimizer.hessian_every_steps": config.optimizer.hessian_every_steps}
    for key, value in positive.items():
        if isinstance(value, int) and value < 1:
            yield f"{key} is {value}; it must be at least 1"
        if value <= 0:
            yield f"{key} is {value}; it must be more than 0"
    yield from _model_problems(model)
    if data.context > model.context:
        yield f"data.context={data.context} is longer than the {model.context} positions of model.context"
    yield from _stage_problems(config)
    yield from _mixture_problems(data)
    yield from _pair_problems(data)
    yield from _example_problems(config)
    yield from _optimizer_problems(config)
    yield from _finetune_problems(config)
    if config.guard.spike_z and config.guard.warmup_steps < 2:
        yield f"guard.warmup_steps is {config.guard.warmup_steps}; spikes (guard.spike_z) are told by 2 steps or more"
    if not 0 < data.held_out < 1:
        yield f"data.held_out is {data.held_out}; it must be more than 0 and less than 1"
    if train.dtype not in ("float32", "bfloat16"):
        yield f"train.dtype is {train.dtype}; it must be float32 or bfloat16"
    yield from _profile_problems(config.log.profile_steps, train.steps)
    yield from _unknown_choices(config, choices)


def _stage_problems(config: ConfigDict) -> Iterator[str]:
    """Of the form and the lengths of `data.stages`; batches that devices cannot share are below."""
    stages = config.data.stages
    for stage in stages:
        numbers = stage if isinstance(stage, tuple | list) else ()
        if len(numbers) != 3 or any(type(number) is not int or number < 1 for number in numbers):
            yield f"data.stages is {stages}; it must be like ((100, 16, 32),): steps, batch_size, context of each"
        elif numbers[2] > config.model.context:
            yield f"data.stages: {numbers[2]} tokens are longer than the {config.model.context} of model.context"
    taken = sum(stage[0] for stage in stages)
    if stages and taken >= config.train.steps:
        yield f"data.stages take {taken} steps of the {config.train.steps} of train.steps"


def _mixture_problems(data: ConfigDict) -> Iterator[str]:
    mixture = data.mixture
    weights = [one[1] for one in mixture if _is_weighted_path(one)]
    numbers = [weight for weight in weights if type(weight) in (int, float)]
    if len(weights) < len(mixture) or not (len(numbers) == len(mixture) or weights == [None] * len(mixture)):
        yield f"data.mixture is {mixture}; it must be like (('sets/a', 0.7), ('sets/b', 0.3)), or all weights None"
    elif any(not weight > 0 for weight in numbers):
        yield f"data.mixture is {mixture}; weights must be more than 0 (leave out a set that is not to be read)"
    if len({one[0] for one in mixture}) < len(mixture):
        yield f"data.mixture is {mixture}; it names a set twice"
    if mixture and data.path:
        yield "data.mixture and data.path are both given; leave one out"
    if data.temperature <= 0:
        yield f"data.temperature is {data.temperature}; it must be more than 0"
    for name, share in data.augment.items():
        if share > 1:
            yield f"data.augment.{name} is {share}; it must be at most 1"


def _pair_problems(data: ConfigDict) -> Iterator[str]:
    languages, columns = data.languages, data.columns
    if languages and (len(languages) != 2 or any(not isinstance(one, str) or not one for one in languages)):
        yield f"data.languages is {languages}; it must name source and target, such as ('en', 'de'), or be ()"
    if len(columns) != 2 or any(type(one) is not int or one < 0 for one in columns) or columns[0] == columns[1]:
        yield f"data.columns is {columns}; it must be two different columns from 0, such as (0, 1)"
    if languages and data.layout != "pairs":
        yield f"data.languages={languages} names parallel text, which data.layout=pairs reads, not {data.layout}"
    if languages and data.mixture:
        yield "data.languages and data.mixture are both given; leave one out"
    if data.layout == "pairs" and any(data.augment.values()):
        yield "data.augment does nothing with data.layout=pairs; leave it out"


def _example_problems(config: ConfigDict) -> Iterator[str]:
    data, c = config.data, config.data.examples
    if not c.form:
        return
    if data.languages or data.mixture:
        yield f"data.examples.form={c.form} and data.{'languages' if data.languages else 'mixture'} are both given"
    asks_head = c.form not in ("text", "instructions", "chat")
    known = ("examples",) if asks_head else ("examples", "packed", "pairs")
    if data.layout not in known or (c.form == "chat" and data.layout == "pairs"):
        yield f"data.examples.form={c.form} needs data.layout={known[0]}, not {data.layout}"
    if c.too_long not in ("cut", "leave_out", "refuse"):
        yield f"data.examples.too_long is {c.too_long!r}; it must be cut, leave_out or refuse"
    if c.form in ("classes", "tags") and len(set(c.labels)) != max(config.model.labels, 2):
        yield (
            f"data.examples.labels names {len(set(c.labels))} labels ({', '.join(c.labels) or 'none'}), and "
            f"model.labels is {config.model.labels}; give the names that the data have, and their number"
        )
    if c.balanced and c.form != "classes":
        yield f"data.examples.balanced is of form=classes alone, not of {c.form}"


def _profile_problems(steps: tuple[Any, ...], last: int) -> Iterator[str]:
    if not steps:
        return
    if len(steps) != 2 or any(type(step) is not int for step in steps):
        yield f"log.profile_steps is {steps}; it must be the first and the last step to trace, such as (10, 13), or ()"
    elif not 1 <= steps[0] <= steps[1] <= last:
        yield f"log.profile_steps is {steps}; it must be 1 <= first <= last <= train.steps={last}"


def _model_problems(model: ConfigDict) -> Iterator[str]:
    if model.width % model.heads and model.head_width == model.width // model.heads:
        yield f"model.heads={model.heads} does not divide model.width={model.width}; or give model.head_width"
    if model.heads % model.kv_heads:
        yield f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}"
    if model.positions == "rotary":
        if model.head_width % 2:
            yield f"model.head_width={model.head_width} is odd; rotary positions turn columns in pairs"
        if model.rotary.theta <= 0 or model.rotary.factor <= 0:
            yield "model.rotary.theta and model.rotary.factor must be more than 0"
        if model.rotary.low_frequency_factor >= model.rotary.high_frequency_factor:
            yield "model.rotary.low_frequency_factor must be less than model.rotary.high_frequency_factor"
    if not model.windows or any(type(window) is not int or window < 0 for window in model.windows):
        yield f"model.windows is {model.windows}; it must list whole numbers of tokens, such as (256, 256, 0)"
    if model.never and not model.head_bias:
        yield f"model.never is {model.never}; it needs model.head_bias, by which these ids are kept out"
    if model.experts_per_token > model.experts:
        yield f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}"
    if not 0 <= model.dropout < 1:
        yield f"model.dropout is {model.dropout}; it must be at least 0 and less than 1"
    yield from _arch_problems(model)


def _arch_problems(model: ConfigDict) -> Iterator[str]:
    if model.predict_ahead and model.arch != "gpt":
        yield f"model.predict_ahead={model.predict_ahead} is for decoders, model.arch=gpt"
    if recurs(model):
        for key, value in {"scan_layers": False, "remat": "none"}.items():
            if model[key] != value:
                yield f"model.{key}={model[key]} is of Transformers alone; recurrent layers need {value}"


def recurs(model: ConfigDict) -> bool:
    """Whether `config.model` has recurrent layers."""
    return model.arch == "recurrent" or (model.arch == "seq2seq" and {model.encoder, model.decoder} != {"transformer"})


def _optimizer_problems(config: ConfigDict) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    for key in ("beta1", "beta2", "momentum", "ema"):
        if optimizer[key] >= 1:
            yield f"optimizer.{key} is {optimizer[key]}; it must be less than 1"
    if optimizer.name == "schedule_free" and optimizer.beta1 == 0:
        yield "optimizer.beta1 is 0; schedule_free needs more"
    if optimizer.name == "schedule_free" and optimizer.ema:
        yield f"optimizer.name=schedule_free and optimizer.ema={optimizer.ema} both average; leave one out"
    if schedule.cooldown_fraction > 1:
        yield f"schedule.cooldown_fraction is {schedule.cooldown_fraction}; it must be at most 1"


def _finetune_problems(config: ConfigDict) -> Iterator[str]:
    options = config.finetune
    if options.method != "full" and not config.init_from:
        yield f"finetune.method={options.method} tunes a part of another run's model; give --config.init_from=RUN"
    if options.ewc and not config.init_from:
        yield f"finetune.ewc={options.ewc} remembers the text of another run; give --config.init_from=RUN"
    if options.method == "rule" and not options.rule:
        yield "finetune.method=rule needs a regular expression of paths; give --config.finetune.rule"
    if options.quantise != "none" and options.method in ("full", "rule", "top"):
        yield (
            f"finetune.quantise={options.quantise} is for methods that add to a frozen base, such as lora; "
            f"with finetune.method={options.method} leave it out"
        )
    for key in ("rank", "alpha", "bottleneck", "length", "b_rate", "layer_decay", "fisher_rows"):
        if options[key] <= 0:
            yield f"finetune.{key} is {options[key]}; it must be more than 0"
    if any(not _is_weighted_path(one) or type(one[1]) not in (int, float) for one in options.rates):
        yield f"finetune.rates is {options.rates}; it must be like (('head', 1.0), ('block_0/', 0.1))"
    if options.dropout >= 1:
        yield f"finetune.dropout is {options.dropout}; it must be less than 1"
    if options.method == "adalora" and options.adalora.first_rank < options.rank:
        yield f"finetune.adalora.first_rank={options.adalora.first_rank} is less than finetune.rank={options.rank}"


def _unknown_choices(config: ConfigDict, choices: Choices) -> Iterator[str]:
    flat = flatten(config)
    for key, known in choices.items():
        for chosen in flat[key] if isinstance(flat[key], tuple) else [flat[key]]:
            if chosen not in known:
                yield f"{key} has no choice {chosen!r}{did_you_mean(chosen, known)}"


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
    """The locked config that `to_json` wrote."""
    return ConfigDict(_with_tuples(json.loads(text))).lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


# What does not change which parameters a run ends with may differ when it goes on.
FREE = ("log.", "mesh.", "checkpoint.", "eval.", "sample.", "data.prefetch", "train.hang_minutes")
# What may change for the steps that are left, and is written down (gptjax.workdir).
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
