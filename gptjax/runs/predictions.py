"""What a task head answers, in words: labels by name, numbers, choices, spans of text. Trains nothing."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console
from gptjax.data import batches, examples, task_formats
from gptjax.data.augment import Augment
from gptjax.data.layouts import LAYOUTS
from gptjax.data.records import Record
from gptjax.data.task_formats import TASK_FORMATS
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.objectives.answers import read_by

if TYPE_CHECKING:
    from gptjax.runs.run import Run

Prediction = dict[str, Any]


def predictions(of: "Run", records: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """What a run's task head says of records, in order.

    Args:
      of: a run that learnt from examples with answers.
      records: with the fields that its examples are read by; the answers' own may lack. What is longer than
        data.context is cut.

    Returns:
      of each: "label" and "probability"; "value"; "choice", from 0, and "probability"; "labels", of each word; or a
      span's "text" and "probability".

    Raises:
      ConfigError: the run learnt no answers from examples.
      DataError: a record lacks a field that is read, or has no text.
    """
    c = of.config.data.copy_and_resolve_references()
    if not c.examples.form or not TASK_FORMATS[c.examples.form].objective:
        raise ConfigError(f"{of.workdir} learnt no answers from examples; what it writes is generate's")
    if not records:
        return []
    with c.unlocked():
        c.examples.too_long = "cut"
    blank = [
        task_formats.with_placeholder_answer(Record(dict(one), f"record {i:,}"), c.examples)
        for i, one in enumerate(records, 1)
    ]
    tokens = examples.to_token_set(of.tokenizer, blank, c, "encoding the records", "the records")
    if tokens.documents != len(blank) * tokens.choices_per_row:
        raise DataError("some of the records have no text within data.context")
    rows = LAYOUTS["examples"](tokens, c.context, 0, Augment(), "")
    every = batches.EvalBatches(rows, min(c.batch_size, len(blank)))
    ask, found = jax.jit(partial(said, of.model)), list[Prediction]()
    with console.bar("answering", len(every)) as advance:
        for i in range(len(every)):
            left = len(blank) - len(found)  # rows of the last batch; the others are blank
            batch = {name: x[:left] for name, x in every[i].items()}
            found += in_words(ask(of.params, every[i])[:left], batch, of.config, of.tokenizer)
            advance(1)
    return found


def said(model: Any, params: Any, batch: Any) -> jax.Array:
    """The head's answers about a batch; see gptjax.models.heads."""
    return models.answer(model, params, read_by(model, batch))


def in_words(answers: Any, batch: Any, config: Any, tokenizer: Tokenizer) -> list[Prediction]:
    """The answers about the rows of a batch; `config`: of the run."""
    labels, task = config.data.examples.labels, WORDS[config.model.task]
    rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["inputs_BT"]))]
    return [task(one, row, labels, tokenizer) for one, row in zip(np.asarray(answers), rows, strict=True)]


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x))."""
    powers = np.exp(x - x.max())
    found: np.ndarray = powers / powers.sum()
    return found


def _label(answer: np.ndarray, row: Any, labels: Sequence[str], tokenizer: Tokenizer) -> Prediction:
    best = int(answer.argmax())
    return {"label": labels[best], "probability": float(softmax(answer)[best])}


def _choice(answer: np.ndarray, row: Any, labels: Sequence[str], tokenizer: Tokenizer) -> Prediction:
    best = int(answer.argmax())
    return {"choice": best, "probability": float(softmax(answer)[best])}


def _value(answer: np.ndarray, row: Any, labels: Sequence[str], tokenizer: Tokenizer) -> Prediction:
    return {"value": float(answer)}


def _labels(answer: np.ndarray, row: Any, labels: Sequence[str], tokenizer: Tokenizer) -> Prediction:
    return {"labels": [labels[best] for best in answer[row["weights_BT"] > 0].argmax(-1)]}


def _span(answer: np.ndarray, row: Any, labels: Sequence[str], tokenizer: Tokenizer) -> Prediction:
    real = row["segments_BT"] > 0
    first, last = (softmax(np.where(real, column, -np.inf)) for column in answer.T)
    both = np.triu(np.outer(first, last))  # it does not end before it begins
    start, stop = (int(at) for at in np.unravel_index(both.argmax(), both.shape))
    ids = row["inputs_BT"][start : stop + 1].tolist()
    return {"text": tokenizer.decode(ids).strip(), "probability": float(both[start, stop])}


# By `config.model.task`.
WORDS = {"classification": _label, "choice": _choice, "regression": _value, "tagging": _labels, "span": _span}


def shown(found: Sequence[Prediction], batch: Any, config: Any, tokenizer: Tokenizer) -> str:
    """A line for each of the first rows of a batch: the answer, the right one of classes and values, and the text."""
    lines = []
    for i, one in enumerate(found):
        own = {name: np.asarray(x[i]) for name, x in batch.items()}
        ids, real = np.atleast_2d(own["inputs_BT"])[0], np.atleast_2d(own["segments_BT"])[0]
        text = tokenizer.decode([one for one in ids[real > 0].tolist() if not tokenizer.is_special_token(one)])
        right = ""
        if config.model.task == "classification":
            right = f" (right: {config.data.examples.labels[int(own['labels_B'])]})"
        elif "labels_B" in own or "values_B" in own:
            right = f" (right: {own.get('labels_B', own.get('values_B')):g})"
        what = ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in one.values())
        lines.append(f"{what}{right}  {' '.join(text.split())[:200]}")
    return "\n".join(lines)
