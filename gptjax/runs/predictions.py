"""Predictions of task heads as Python values: labels by name, numbers, choices, spans of text."""

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
from gptjax.objectives.task_losses import model_inputs

if TYPE_CHECKING:
    from gptjax.runs.run import Run

Prediction = dict[str, Any]


def predictions(run: "Run", records: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """Returns predictions of a run's task head for records, in order.

    Args:
      run: trained on examples with answers.
      records: with the fields of its examples, except for the answers. Longer texts are truncated to data.context.

    Returns:
      For each record: "label" and "probability"; "value"; "choice", from 0, and "probability"; "labels", of each word;
      or a span's "text" and "probability".

    Raises:
      ConfigError: the run was not trained on examples with answers.
      DataError: a record lacks a field, or has no text.
    """
    c = run.config.data.copy_and_resolve_references()
    if not c.examples.form or not TASK_FORMATS[c.examples.form].objective:
        raise ConfigError(f"{run.workdir} was not trained on examples with answers; use gptjax.generate")
    if not records:
        return []
    with c.unlocked():
        c.examples.too_long = "cut"
    unanswered = [
        task_formats.with_placeholder_answer(Record(dict(one), f"record {i:,}"), c.examples)
        for i, one in enumerate(records, 1)
    ]
    tokens = examples.to_token_set(run.tokenizer, unanswered, c, "encoding the records", "the records")
    if tokens.documents != len(unanswered) * tokens.choices_per_row:
        raise DataError("some of the records have no text within data.context")
    rows = LAYOUTS["examples"](tokens, c.context, 0, Augment(), "")
    eval_batches = batches.EvalBatches(rows, min(c.batch_size, len(unanswered)))
    predict, results = jax.jit(partial(head_outputs, run.model)), list[Prediction]()
    with console.bar("predicting", len(eval_batches)) as advance:
        for i in range(len(eval_batches)):
            n = len(unanswered) - len(results)  # the remaining rows of the last batch are padding
            batch = {name: x[:n] for name, x in eval_batches[i].items()}
            results += to_predictions(predict(run.params, eval_batches[i])[:n], batch, run.config, run.tokenizer)
            advance(1)
    return results


def head_outputs(model: Any, params: Any, batch: Any) -> jax.Array:
    """Returns the head's outputs for a batch; see gptjax.models.heads."""
    return models.task_output(model, params, model_inputs(model, batch))


def to_predictions(answers: Any, batch: Any, config: Any, tokenizer: Tokenizer) -> list[Prediction]:
    """Converts the head's outputs for a batch to predictions; `config` is that of the run."""
    labels, to_prediction = config.data.examples.labels, TASKS[config.model.task]
    rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["inputs_BT"]))]
    return [to_prediction(one, row, labels, tokenizer) for one, row in zip(np.asarray(answers), rows, strict=True)]


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns exp(x) / sum(exp(x))."""
    exp = np.exp(x - x.max())
    probabilities: np.ndarray = exp / exp.sum()
    return probabilities


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
    start, stop = (int(i) for i in np.unravel_index(both.argmax(), both.shape))
    ids = row["inputs_BT"][start : stop + 1].tolist()
    return {"text": tokenizer.decode(ids).strip(), "probability": float(both[start, stop])}


# By `config.model.task`.
TASKS = {"classification": _label, "choice": _choice, "regression": _value, "tagging": _labels, "span": _span}


def format_predictions(predictions: Sequence[Prediction], batch: Any, config: Any, tokenizer: Tokenizer) -> str:
    """Formats a line for each row of a batch: the prediction, the target of classes and values, and the text."""
    lines = []
    for i, prediction in enumerate(predictions):
        row = {name: np.asarray(x[i]) for name, x in batch.items()}
        ids, segments = np.atleast_2d(row["inputs_BT"])[0], np.atleast_2d(row["segments_BT"])[0]
        text = tokenizer.decode(
            [token for token in ids[segments > 0].tolist() if not tokenizer.is_special_token(token)]
        )
        target = ""
        if config.model.task == "classification":
            target = f" (right: {config.data.examples.labels[int(row['labels_B'])]})"
        elif "labels_B" in row or "values_B" in row:
            target = f" (right: {row.get('labels_B', row.get('values_B')):g})"
        values = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in prediction.values())
        lines.append(f"{', '.join(values)}{target}  {' '.join(text.split())[:200]}")
    return "\n".join(lines)
