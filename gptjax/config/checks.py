"""Constraints between the values of a config, without data and devices; each problem is one line.

Only names and numbers are checked here. Packages that have constraints on their own keys have a `problems` function.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import did_you_mean, flatten, is_weighted_path
from gptjax.config.errors import ConfigError

Choices = Mapping[str, Mapping[str, Any]]
UNROLLED = 10_000  # blocks of an unrolled program; compiling it takes an hour


def check(config: ConfigDict, choices: Mapping[str, Mapping[str, Any]], more: Iterable[str] = ()) -> None:
    """Raises ConfigError for the first problem of a config.

    Args:
      config: resolved config.
      choices: allowed values of keys that name something.
      more: problems found by other packages, evaluated if there is none here.
    """
    for problem in itertools.chain(problems(config, choices), more):
        raise ConfigError(problem)


def problems(config: ConfigDict, choices: Choices) -> Iterator[str]:
    """Yields the problems of a resolved config; `choices` are the allowed values of keys that name something."""
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
    yield from model_problems(model)
    yield from parametrization_problems(config)
    if data.context > model.context:
        yield f"data.context={data.context} is longer than the {model.context} positions of model.context"
    yield from stage_problems(config)
    yield from mixture_problems(data)
    yield from pair_problems(data)
    yield from example_problems(config)
    yield from optimizer_problems(config)
    yield from finetune_problems(config)
    if config.guard.spike_z and config.guard.warmup_steps < 2:
        yield f"guard.warmup_steps is {config.guard.warmup_steps}; detecting spikes (guard.spike_z) needs at least 2"
    if not 0 < data.held_out < 1:
        yield f"data.held_out is {data.held_out}; it must be more than 0 and less than 1"
    if train.dtype not in ("float32", "bfloat16"):
        yield f"train.dtype is {train.dtype}; it must be float32 or bfloat16"
    yield from profile_problems(config.log.profile_steps, train.steps)
    if config.log.every_steps > 0 and config.log.statistics % config.log.every_steps:
        yield f"log.statistics={config.log.statistics} must be a multiple of log.every_steps={config.log.every_steps}"
    yield from unknown_choices(config, choices)


def parametrization_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of scaling with width and depth."""
    model, name = config.model, config.optimizer.name
    mup, deep = model.parametrization == "mup", model.base_layers is not None
    for key in ("base_width", "base_head_width"):
        if mup and model[key] is None:
            size = key.removeprefix("base_")
            yield f"model.parametrization=mup needs model.{key}: the {size} at which learning rates were tuned"
        if not mup and model[key] is not None:
            yield f"model.{key} is for model.parametrization=mup, not {model.parametrization}"
    for key in ("base_width", "base_head_width", "base_layers"):
        if model[key] is not None and model[key] < 1:
            yield f"model.{key} is {model[key]}; it must be at least 1"
    if (mup or deep) and model.arch == "recurrent":
        yield "model.parametrization=mup and model.base_layers are for Transformers; model.arch is recurrent"
    if (mup or deep) and name in ("adafactor", "sophia"):
        yield f"optimizer.name={name} has no known scaling rule; use adamw, lion, schedule_free or muon"


def stage_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of the format and lengths of `data.stages`."""
    stages = config.data.stages
    for stage in stages:
        numbers = stage if isinstance(stage, tuple | list) else ()
        if len(numbers) != 3 or any(type(number) is not int or number < 1 for number in numbers):
            yield f"data.stages is {stages}; it must be like ((100, 16, 32),): steps, batch_size, context of each"
        elif numbers[2] > config.model.context:
            yield f"data.stages: {numbers[2]} tokens are longer than the {config.model.context} of model.context"
    stage_steps = sum(stage[0] for stage in stages)
    if stages and stage_steps >= config.train.steps:
        yield f"data.stages take {stage_steps} steps of the {config.train.steps} of train.steps"


def mixture_problems(data: ConfigDict) -> Iterator[str]:
    """Yields problems of `data.mixture` and its weights."""
    mixture = data.mixture
    weights = [one[1] for one in mixture if is_weighted_path(one)]
    numbers = [weight for weight in weights if type(weight) in (int, float)]
    if len(weights) < len(mixture) or not (len(numbers) == len(mixture) or weights == [None] * len(mixture)):
        yield f"data.mixture is {mixture}; it must be like (('sets/a', 0.7), ('sets/b', 0.3)), or all weights None"
    elif any(not weight > 0 for weight in numbers):
        yield f"data.mixture is {mixture}; weights must be more than 0 (leave out unused sets)"
    if len({one[0] for one in mixture}) < len(mixture):
        yield f"data.mixture is {mixture}; it names a set twice"
    if mixture and data.path:
        yield "data.mixture and data.path are both given; leave one out"
    if data.temperature <= 0:
        yield f"data.temperature is {data.temperature}; it must be more than 0"
    for name, share in data.augment.items():
        if share > 1:
            yield f"data.augment.{name} is {share}; it must be at most 1"


def pair_problems(data: ConfigDict) -> Iterator[str]:
    """Yields problems of parallel text."""
    languages, columns = data.languages, data.columns
    if languages and (len(languages) != 2 or any(not isinstance(one, str) or not one for one in languages)):
        yield f"data.languages is {languages}; it must name source and target, such as ('en', 'de'), or be ()"
    if len(columns) != 2 or any(type(one) is not int or one < 0 for one in columns) or columns[0] == columns[1]:
        yield f"data.columns is {columns}; it must be two different columns from 0, such as (0, 1)"
    if languages and data.layout != "pairs":
        yield f"data.languages={languages} is parallel text, which needs data.layout=pairs, not {data.layout}"
    if languages and data.mixture:
        yield "data.languages and data.mixture are both given; leave one out"
    if data.layout == "pairs" and any(data.augment.values()):
        yield "data.augment does nothing with data.layout=pairs; leave it out"


def example_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of records with fields."""
    data, c = config.data, config.data.examples
    if not c.form:
        return
    if data.languages or data.mixture:
        yield f"data.examples.form={c.form} and data.{'languages' if data.languages else 'mixture'} are both given"
    needs_head = c.form not in ("text", "instructions", "chat")
    layouts = ("examples",) if needs_head else ("examples", "packed", "pairs")
    if data.layout not in layouts or (c.form == "chat" and data.layout == "pairs"):
        yield f"data.examples.form={c.form} needs data.layout={layouts[0]}, not {data.layout}"
    if c.too_long not in ("cut", "leave_out", "refuse"):
        yield f"data.examples.too_long is {c.too_long!r}; it must be cut, leave_out or refuse"
    if c.form in ("classes", "tags") and len(set(c.labels)) != max(config.model.labels, 2):
        yield (
            f"data.examples.labels names {len(set(c.labels))} labels ({', '.join(c.labels) or 'none'}), and "
            f"model.labels is {config.model.labels}; give all label names in the data, and their number"
        )
    if c.form in ("tags", "spans") and any(data.augment.values()):
        yield f"data.augment moves tokens, but data.examples.form={c.form} labels each of them; leave it out"
    if c.balanced and c.form != "classes":
        yield f"data.examples.balanced is for form=classes only, not {c.form}"


def profile_problems(steps: tuple[Any, ...], last: int) -> Iterator[str]:
    """Yields problems of `log.profile_steps` in a run of `last` steps."""
    if not steps:
        return
    if len(steps) != 2 or any(type(step) is not int for step in steps):
        yield f"log.profile_steps is {steps}; it must be the first and the last step to trace, such as (10, 13), or ()"
    elif not 1 <= steps[0] <= steps[1] <= last:
        yield f"log.profile_steps is {steps}; it must be 1 <= first <= last <= train.steps={last}"


def model_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of shapes and choices in `config.model`."""
    if model.width % model.heads and model.head_width == model.width // model.heads:
        yield f"model.heads={model.heads} does not divide model.width={model.width}; or give model.head_width"
    if model.heads % model.kv_heads:
        yield f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}"
    if model.positions == "rotary":
        if model.head_width % 2:
            yield f"model.head_width={model.head_width} is odd; rotary positions rotate pairs of columns"
        if model.rotary.theta <= 0 or model.rotary.factor <= 0:
            yield "model.rotary.theta and model.rotary.factor must be more than 0"
        if model.rotary.low_frequency_factor >= model.rotary.high_frequency_factor:
            yield "model.rotary.low_frequency_factor must be less than model.rotary.high_frequency_factor"
    if not model.windows or any(type(window) is not int or window < 0 for window in model.windows):
        yield f"model.windows is {model.windows}; it must be a list of integers, such as (256, 256, 0)"
    if model.experts_per_token > model.experts:
        yield f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}"
    if not 0 <= model.dropout < 1:
        yield f"model.dropout is {model.dropout}; it must be at least 0 and less than 1"
    for key in ("layers", "encoder_layers"):
        if not model.scan_layers and (model[key] or 0) > UNROLLED:
            yield f"model.{key} is {model[key]}; more than {UNROLLED:,} blocks need model.scan_layers"
    yield from suppress_problems(model)
    yield from arch_problems(model)


def suppress_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of `model.suppress_tokens`."""
    if any(type(token) is not int or token < 0 for token in model.suppress_tokens):
        yield f"model.suppress_tokens is {model.suppress_tokens}; it must list ids, such as (0,)"
    if model.suppress_tokens and not model.head_bias:
        yield f"model.suppress_tokens is {model.suppress_tokens}; it needs model.head_bias, which suppresses them"


def arch_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of options for a single `model.arch`."""
    if model.mtp_depth and model.arch != "gpt":
        yield f"model.mtp_depth={model.mtp_depth} is for decoders, model.arch=gpt"
    if is_recurrent(model):
        for key, value in {"scan_layers": False, "remat": "none"}.items():
            if model[key] != value:
                yield f"model.{key}={model[key]} is for Transformers only; recurrent layers need {value}"


def is_recurrent(model: ConfigDict) -> bool:
    """Returns True if a `config.model` has recurrent layers."""
    return model.arch == "recurrent" or (model.arch == "seq2seq" and {model.encoder, model.decoder} != {"transformer"})


def optimizer_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of `config.optimizer` and `config.schedule`."""
    optimizer, schedule = config.optimizer, config.schedule
    for key in ("beta1", "beta2", "momentum", "ema"):
        if optimizer[key] >= 1:
            yield f"optimizer.{key} is {optimizer[key]}; it must be less than 1"
    if optimizer.name == "schedule_free" and optimizer.beta1 == 0:
        yield "optimizer.beta1 is 0; schedule_free needs more than 0"
    if optimizer.name == "schedule_free" and optimizer.ema:
        yield f"optimizer.name=schedule_free and optimizer.ema={optimizer.ema} both average; leave one out"
    if schedule.cooldown_fraction > 1:
        yield f"schedule.cooldown_fraction is {schedule.cooldown_fraction}; it must be at most 1"


def finetune_problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of `config.finetune`."""
    options = config.finetune
    if options.method != "full" and not config.init_from:
        yield f"finetune.method={options.method} fine-tunes the model of another run; give --config.init_from=RUN"
    if options.ewc and not config.init_from:
        yield f"finetune.ewc={options.ewc} uses the text of another run; give --config.init_from=RUN"
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
    if any(not is_weighted_path(one) or type(one[1]) not in (int, float) or one[1] < 0 for one in options.rates):
        yield f"finetune.rates is {options.rates}; it must be like (('head', 1.0), ('block_0/', 0.1))"
    yield from pattern_problems(options)
    for key in ("beta1", "beta2"):
        if options.adalora[key] >= 1:
            yield f"finetune.adalora.{key} is {options.adalora[key]}; it must be less than 1"
    if options.dropout >= 1:
        yield f"finetune.dropout is {options.dropout}; it must be less than 1"
    if options.method == "adalora" and options.adalora.first_rank < options.rank:
        yield f"finetune.adalora.first_rank={options.adalora.first_rank} is less than finetune.rank={options.rank}"


def pattern_problems(options: ConfigDict) -> Iterator[str]:
    """Yields problems of the regular expressions in `config.finetune`."""
    patterns = [(key, options[key]) for key in ("rule", "also", "targets")]
    for key, pattern in [*patterns, *(("rates", one[0]) for one in options.rates if is_weighted_path(one))]:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"finetune.{key} has {pattern!r}, which is not a regular expression: {error}"


def unknown_choices(config: ConfigDict, choices: Choices) -> Iterator[str]:
    """Yields unknown choices."""
    flat = flatten(config)
    for key, names in choices.items():
        for chosen in flat[key] if isinstance(flat[key], tuple) else [flat[key]]:
            if not isinstance(chosen, str) or chosen not in names:
                yield f"{key} has no choice {chosen!r}{did_you_mean(str(chosen), names)}"
