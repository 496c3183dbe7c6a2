"""Training objectives by name: `(params, batch, rng) -> (loss, metrics)`.

Training minimizes the loss; `metrics["loss"]` is the part of it that measures how well the batch is predicted, and that
evaluation reports. All are weighted sums over the batch, not means: the train step first divides each kind of weight by
its sum over the whole batch (`normalize_weights`), so that slices of a batch add up to exactly the batch, however the
weights are distributed.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from gptjax.config import did_you_mean
from gptjax.config.errors import ConfigError
from gptjax.data.task_formats import TASK_FORMATS
from gptjax.data.token_sets import TokenSet
from gptjax.data.tokenizers.specials import SpecialIds, lookup_special_ids
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.objectives.adversarial import adversarial
from gptjax.objectives.causal import causal
from gptjax.objectives.contrastive import contrastive, whole_texts
from gptjax.objectives.denoising import denoising, sentinel_count
from gptjax.objectives.distillation import distillation
from gptjax.objectives.fim import fim
from gptjax.objectives.masked import masked
from gptjax.objectives.multi_token import multi_token
from gptjax.objectives.next_sentence import next_sentence
from gptjax.objectives.objective import ONE_TEXT, Arrays, Loss, Objective, Row, RowContext, weighted_sum
from gptjax.objectives.prefix import prefix
from gptjax.objectives.row_context import make_row_context
from gptjax.objectives.task_losses import classification, regression, span, tagging
from gptjax.objectives.tokens import token_prediction
from gptjax.objectives.unlikelihood import UnlikelihoodOptions, unlikelihood

DECODER, ENCODER, SEQ2SEQ = (frozenset({kind}) for kind in ("decoder", "encoder", "seq2seq"))
ANY = DECODER | ENCODER | SEQ2SEQ
ROW_WEIGHTS = "weights_B"

OBJECTIVES: dict[str, Objective] = {
    "causal": Objective(causal),
    "prefix": Objective(token_prediction, row=prefix),
    "fim": Objective(token_prediction, row=fim, specials=("fim_prefix", "fim_suffix", "fim_middle")),
    "multi_token": Objective(multi_token),
    "unlikelihood": Objective(unlikelihood, options=UnlikelihoodOptions),
    "distillation": Objective(distillation, DECODER | SEQ2SEQ),
    "masked": Objective(token_prediction, ENCODER, masked, ("mask",), after=("next_sentence",)),
    "next_sentence": Objective(
        classification,
        ENCODER,
        next_sentence,
        ("class", "separator"),
        ("classification",),
        ONE_TEXT,
        weights=ROW_WEIGHTS,
    ),
    "seq2seq": Objective(token_prediction, SEQ2SEQ),
    "denoising": Objective(token_prediction, SEQ2SEQ, denoising, ("mask", "sentinels", "end"), layouts=ONE_TEXT),
    "contrastive": Objective(contrastive, DECODER | ENCODER, whole_texts, tasks=("embedding",), weights=ROW_WEIGHTS),
    "classification": Objective(classification, ANY, tasks=("classification",), weights=ROW_WEIGHTS),
    "choice": Objective(classification, ANY, tasks=("choice",), weights=ROW_WEIGHTS),
    "tagging": Objective(tagging, ANY, tasks=("tagging",)),
    "span": Objective(span, ANY, tasks=("span",), weights=ROW_WEIGHTS),
    "regression": Objective(regression, ANY, tasks=("regression",), weights=ROW_WEIGHTS),
}


def parse_objective(chosen: str) -> list[tuple[str, float]]:
    """Parses `config.train.objective`, such as "masked + 0.5*next_sentence", into names and factors.

    Raises:
      ConfigError: it is not a sum of objectives.
    """
    terms = []
    for part in chosen.split("+"):
        match = re.fullmatch(r"\s*(?:([0-9.]+)\s*\*\s*)?(\w+)\s*", part)
        if not match:
            raise ConfigError(f"train.objective is {chosen!r}; it must be like causal, or masked + 0.5*next_sentence")
        terms.append((match[2], float(match[1] or 1)))
    return terms


def loss(config: Any, model: nn.Module) -> Loss:
    """Builds the loss of a run of this config."""
    factors = dict(parse_objective(config.train.objective))
    losses = {name: OBJECTIVES[name].loss(model, config.objective) for name in factors}
    return adversarial(weighted_sum(losses, factors), model, config.objective)


def mean_metrics(objective: str, sums: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Computes means of a loss's metrics.

    Args:
      objective: `config.train.objective`.
      sums: weighted sums of the metrics over batches, by weights that are not normalized.
      weights: the sum of each kind of weight, by its name in a batch.

    Returns:
      The metrics. With several objectives those of each, and "loss" is the sum of theirs times their factors.
    """
    terms = parse_objective(objective)
    by_name = {name: weights[OBJECTIVES[name].weights] for name, _ in terms}
    if list(dict(terms).values()) == [1.0]:
        return {name: value / by_name[terms[0][0]] for name, value in sums.items()}
    means = {
        key: value / weight
        for name, weight in by_name.items()
        for key, value in sums.items()
        if key.startswith(f"{name}_")
    }
    return {"loss": sum(factor * means[f"{name}_loss"] for name, factor in terms)} | means


def row_transform(config: Any) -> Row | None:
    """Returns the transform of a row of text for the objectives of a config; None: rows are not transformed."""
    objectives = [OBJECTIVES[name] for name, _ in parse_objective(config.train.objective)]
    transforms = [one.row for one in sorted(objectives, key=lambda one: len(one.after)) if one.row is not None]

    def transform(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
        for one in transforms:
            row = one(row, context, rng)
        return row

    return transform if transforms else None


def set_transform(config: Any, tokenizer: Tokenizer) -> Callable[[TokenSet], Callable[[Arrays, Any], Arrays] | None]:
    """Returns `set -> ((row, rng) -> row)`, or None for rows as the layout gives them; see gptjax.data.Data.rows."""
    transform = row_transform(config)
    specials = special_ids(config, tokenizer) if transform else None

    def for_set(tokens: TokenSet) -> Callable[[Arrays, Any], Arrays] | None:
        if transform is None or specials is None:
            return None
        context = make_row_context(tokenizer, specials, config.objective, tokens)
        return lambda row, rng: transform(row, context, rng)

    return for_set


def special_ids(config: Any, tokenizer: Tokenizer) -> SpecialIds:
    """Returns the special ids that the objectives of a config need; the model's vocabulary has to include them.

    Raises:
      DataError: an objective needs an end of text, and the tokenizer has none.
    """
    names = [name for one, _ in parse_objective(config.train.objective) for name in OBJECTIVES[one].specials]
    contexts = [config.data.context, *(stage[2] for stage in config.data.stages)]
    count = max(sentinel_count(context, config.objective) for context in contexts) if "sentinels" in names else 0
    return lookup_special_ids(tokenizer, names, count)


def problems(config: Any, kind: str) -> Iterator[str]:
    """Yields a line for each problem of the objectives of a config, for a model of that kind."""
    names = [name for name, _ in parse_objective(config.train.objective)]
    for name in names:
        if name not in OBJECTIVES:
            yield f"train.objective has no choice {name!r}{did_you_mean(name, OBJECTIVES)}"
            return
        one = OBJECTIVES[name]
        if kind not in one.kinds:
            wanted = " or ".join(sorted(one.kinds))
            yield f"train.objective={name} is for {wanted} models, and {config.model.arch} is a kind of {kind}"
        if one.tasks and config.model.task not in one.tasks:
            yield f"train.objective={name} needs a task head, and model.task is {config.model.task}, not {one.tasks[0]}"
        if one.layouts and config.data.layout not in one.layouts:
            wanted = " or ".join(one.layouts)
            yield f"train.objective={name} reads rows of one text, data.layout={wanted}, not {config.data.layout}"
    yield from form_problems(config, names)
    if len(set(names)) < len(names):
        yield f"train.objective is {config.train.objective!r}; it names an objective twice"
    for first, second in itertools.combinations([name for name in names if OBJECTIVES[name].row], 2):
        if first not in OBJECTIVES[second].after and second not in OBJECTIVES[first].after:
            yield f"train.objective={config.train.objective!r}: {first} and {second} each want rows of their own"
    yield from option_problems(config, names)


def form_problems(config: Any, names: Sequence[str]) -> Iterator[str]:
    """Yields a line for each objective whose task does not fit the form of the examples."""
    form = TASK_FORMATS.get(config.data.examples.form)
    needed = {one.objective: name for name, one in TASK_FORMATS.items() if one.objective}
    for name in names:
        if name in needed and needed[name] != config.data.examples.form:
            yield f"train.objective={name} learns from examples with answers; set data.examples.form={needed[name]}"
        if form and form.objective not in ("", name):
            yield f"data.examples.form={config.data.examples.form} is for train.objective={form.objective}, not {name}"


def option_problems(config: Any, names: Sequence[str]) -> Iterator[str]:
    """Yields a line for each problem of the options (`config.objective`) of objectives."""
    options = config.objective
    for key in ("label_smoothing", "mask_rate", "fim_rate", "fim_spm"):
        if options[key] > 1 or (options[key] == 1 and key in ("label_smoothing", "mask_rate")):
            most = "less than 1" if key in ("label_smoothing", "mask_rate") else "at most 1"
            yield f"objective.{key} is {options[key]}; it must be {most}"
    positive = ("mask_rate", "mean_span", "temperature", "teacher_temperature", "epsilon", "adversarial_steps")
    for key in positive:
        if options[key] <= 0:
            yield f"objective.{key} is {options[key]}; it must be more than 0"
    if options.mean_span < 1:
        yield f"objective.mean_span is {options.mean_span}; spans have 1 token or more"
    if options.teacher_share > 1:
        yield f"objective.teacher_share is {options.teacher_share}; it must be at most 1"
    if "distillation" in names and not options.teacher:
        yield "train.objective=distillation needs a teacher; give --config.objective.teacher=RUN"
    if "contrastive" in names and not config.model.dropout and config.data.layout != "pairs":
        yield "train.objective=contrastive tells two views of a text apart by dropout; set model.dropout, or give pairs"
    if "denoising" in names and min([config.data.context, *(stage[2] for stage in config.data.stages)]) < 8:
        yield f"data.context={config.data.context} is too short for train.objective=denoising; give 8 tokens or more"


def normalize_weights(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Divides each kind of weight of a batch by its sum, so that weighted sums are means."""
    return {name: x / x.sum() if name.startswith("weights_") else x for name, x in batch.items()}
