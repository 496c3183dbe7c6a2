"""Objectives: what a batch asks of the parameters. `(params, batch, rng) -> (loss, metrics)`.

The loss is what training lowers; `metrics["loss"]` is its part that says how well the batch was predicted, and that
evaluation reads. All are sums over the batch by weight, not means: whoever differentiates divides each kind of weight
by its sum over the whole batch first (`shared_out`), so that slices of a batch add up to exactly the batch, however
their weights fall.
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
from gptjax.objectives.adversarial import ATTACKS, adversarial
from gptjax.objectives.answers import classification, regression, span, tagging
from gptjax.objectives.causal import causal
from gptjax.objectives.contrastive import contrastive, whole_texts
from gptjax.objectives.denoising import CORRUPTIONS, denoising, sentinels
from gptjax.objectives.distillation import distillation
from gptjax.objectives.fim import fim
from gptjax.objectives.masked import MASKINGS, masked
from gptjax.objectives.multi_token import multi_token
from gptjax.objectives.next_sentence import next_sentence
from gptjax.objectives.objective import ONE_TEXT, Arrays, Loss, Objective, Reading, Row, together
from gptjax.objectives.prefix import prefix
from gptjax.objectives.reading import reading
from gptjax.objectives.tokens import predicted

DECODER, ENCODER, SEQ2SEQ = (frozenset({kind}) for kind in ("decoder", "encoder", "seq2seq"))
ANY = DECODER | ENCODER | SEQ2SEQ
ROWS = "weights_B"

OBJECTIVES: dict[str, Objective] = {
    "causal": Objective(causal),
    "prefix": Objective(predicted, row=prefix),
    "fim": Objective(predicted, row=fim, specials=("fim_prefix", "fim_suffix", "fim_middle")),
    "multi_token": Objective(multi_token),
    "distillation": Objective(distillation, DECODER | SEQ2SEQ),
    "masked": Objective(predicted, ENCODER, masked, ("mask",), after=("next_sentence",)),
    "next_sentence": Objective(
        classification, ENCODER, next_sentence, ("class", "separator"), ("classification",), ONE_TEXT, weights=ROWS
    ),
    "seq2seq": Objective(predicted, SEQ2SEQ),
    "denoising": Objective(predicted, SEQ2SEQ, denoising, ("mask", "sentinels", "end"), layouts=ONE_TEXT),
    "contrastive": Objective(contrastive, DECODER | ENCODER, whole_texts, tasks=("embedding",), weights=ROWS),
    "classification": Objective(classification, ANY, tasks=("classification",), weights=ROWS),
    "choice": Objective(classification, ANY, tasks=("choice",), weights=ROWS),
    "tagging": Objective(tagging, ANY, tasks=("tagging",)),
    "span": Objective(span, ANY, tasks=("span",), weights=ROWS),
    "regression": Objective(regression, ANY, tasks=("regression",), weights=ROWS),
}


# What the keys of `config.objective` choose among.
CHOICES: dict[str, Mapping[str, Any]] = {
    "objective.masking": MASKINGS,
    "objective.corruption": CORRUPTIONS,
    "objective.adversarial": ATTACKS,
}

# Every key of `config.objective`, with values that change nothing: of runs that were imported.
PLAIN: dict[str, Any] = dict(
    label_smoothing=0.0, z_loss=0.0, mask_rate=0.15, masking="token", corruption="spans", mean_span=3.0,
    permute_sentences=False, fim_rate=0.5, fim_spm=0.5, temperature=0.05, teacher="",
    teacher_temperature=2.0, teacher_share=0.5, adversarial="none", epsilon=1.0, adversarial_steps=3,
)  # fmt: skip


def parts(chosen: str) -> list[tuple[str, float]]:
    """The objectives that `config.train.objective` names, each with its factor: of "masked + 0.5*next_sentence" two.

    Raises:
      ConfigError: it is not of that form.
    """
    found = []
    for part in chosen.split("+"):
        match = re.fullmatch(r"\s*(?:([0-9.]+)\s*\*\s*)?(\w+)\s*", part)
        if not match:
            raise ConfigError(f"train.objective is {chosen!r}; it must be like causal, or masked + 0.5*next_sentence")
        found.append((match[2], float(match[1] or 1)))
    return found


def loss(config: Any, model: nn.Module) -> Loss:
    """What a run of this config lowers."""
    factors = dict(parts(config.train.objective))
    losses = {name: OBJECTIVES[name].loss(model, config.objective) for name in factors}
    return adversarial(together(losses, factors), model, config.objective)


def means(chosen: str, sums: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A loss's metrics as means.

    Args:
      chosen: `config.train.objective`.
      sums: metrics over batches, by weights as they are.
      weights: the sum of each kind of weight, by its name in a batch.

    Returns:
      the metrics; of several objectives each one's, and as "loss" the sum by their factors.
    """
    found = parts(chosen)
    by_name = {name: weights[OBJECTIVES[name].weights] for name, _ in found}
    if list(dict(found).values()) == [1.0]:
        return {name: value / by_name[found[0][0]] for name, value in sums.items()}
    each = {
        key: value / weight
        for name, weight in by_name.items()
        for key, value in sums.items()
        if key.startswith(f"{name}_")
    }
    return {"loss": sum(factor * each[f"{name}_loss"] for name, factor in found)} | each


def row_of(config: Any) -> Row | None:
    """How a row of text is prepared for the objectives of a config; None: as the layout gives it."""
    chosen = [OBJECTIVES[name] for name, _ in parts(config.train.objective)]
    found = [one.row for one in sorted(chosen, key=lambda one: len(one.after)) if one.row is not None]

    def prepared(row: Arrays, reading: Reading, rng: np.random.Generator) -> Arrays:
        for prepare in found:
            row = prepare(row, reading, rng)
        return row

    return prepared if found else None


def preparing(config: Any, tokenizer: Tokenizer) -> Callable[[TokenSet], Callable[[Arrays, Any], Arrays] | None]:
    """`set -> ((row, rng) -> row)`, or None for rows as the layout gives them; see gptjax.data.Data.rows."""
    row = row_of(config)
    known = special_ids(config, tokenizer) if row else None

    def of_set(tokens: TokenSet) -> Callable[[Arrays, Any], Arrays] | None:
        if row is None or known is None:
            return None
        facts = reading(tokenizer, known, config.objective, tokens)
        return lambda arrays, rng: row(arrays, facts, rng)

    return of_set


def special_ids(config: Any, tokenizer: Tokenizer) -> SpecialIds:
    """The ids that the objectives of a config need besides text's; a model has to know `vocabulary` ids.

    Raises:
      DataError: the tokenizer has no end of text, and one of them needs it.
    """
    names = [name for one, _ in parts(config.train.objective) for name in OBJECTIVES[one].specials]
    contexts = [config.data.context, *(stage[2] for stage in config.data.stages)]
    count = max(sentinels(context, config.objective) for context in contexts) if "sentinels" in names else 0
    return lookup_special_ids(tokenizer, names, count)


def problems(config: Any, kind: str) -> Iterator[str]:
    """What is wrong with the objectives of a config whose model is of that kind, one line each."""
    names = [name for name, _ in parts(config.train.objective)]
    for name in names:
        if name not in OBJECTIVES:
            yield f"train.objective has no choice {name!r}{did_you_mean(name, OBJECTIVES)}"
            return
        one = OBJECTIVES[name]
        if kind not in one.kinds:
            wanted = " or ".join(sorted(one.kinds))
            yield f"train.objective={name} is for {wanted} models, and {config.model.arch} is a kind of {kind}"
        if one.tasks and config.model.task not in one.tasks:
            yield f"train.objective={name} asks a task head, and model.task is {config.model.task}, not {one.tasks[0]}"
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
    """Objectives that ask a task head about texts, and records that are of another form, one line each."""
    form = TASK_FORMATS.get(config.data.examples.form)
    asked = {own.objective: name for name, own in TASK_FORMATS.items() if own.objective}
    for name in names:
        if name in asked and asked[name] != config.data.examples.form:
            yield f"train.objective={name} learns from examples with answers; set data.examples.form={asked[name]}"
        if form and form.objective not in ("", name):
            yield f"data.examples.form={config.data.examples.form} is for train.objective={form.objective}, not {name}"


def option_problems(config: Any, names: Sequence[str]) -> Iterator[str]:
    """What is wrong with the options (`config.objective`) of objectives, one line each."""
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
        yield "train.objective=contrastive tells a text from itself by dropout alone; set model.dropout, or give pairs"
    if "denoising" in names and min([config.data.context, *(stage[2] for stage in config.data.stages)]) < 8:
        yield f"data.context={config.data.context} is too short for train.objective=denoising; give 8 tokens or more"


def normalize_weights(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with each kind of weight divided by its sum, so that sums by weight are means."""
    return {name: x / x.sum() if name.startswith("weights_") else x for name, x in batch.items()}
