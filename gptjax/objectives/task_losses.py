"""Losses of task heads: classification, choice, tagging, spans and regression.

Labels are integers here. Batches have them from names, and give missing ones the weight 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives.objective import Loss

LossAndMetrics = tuple[jax.Array, dict[str, jax.Array]]


def classification(model: nn.Module, options: Any) -> Loss:
    """Cross-entropy of `labels_B` among labels or choices, weighted by weights_B; "accuracy" counts hits."""
    return _task_loss(
        model,
        lambda output, batch: label_cross_entropy(
            output, batch["labels_B"], batch["weights_B"], options.label_smoothing
        ),
    )


def tagging(model: nn.Module, options: Any) -> Loss:
    """Cross-entropy of each token's label, `labels_BT`, weighted by weights_BT; "accuracy" as of classification."""
    return _task_loss(
        model,
        lambda output, batch: label_cross_entropy(
            output, batch["labels_BT"], batch["weights_BT"], options.label_smoothing
        ),
    )


def span(model: nn.Module, options: Any) -> Loss:
    """Mean of the cross-entropies of a span's first and last token, `spans_B2`, among the row's (arXiv 1810.04805 4.2),
    weighted by weights_B; "accuracy" counts rows in which both are right."""
    return _task_loss(
        model,
        lambda output, batch: span_cross_entropy(
            output, batch["spans_B2"], batch["weights_B"], batch.get("segments_BT"), options.label_smoothing
        ),
    )


def regression(model: nn.Module, options: Any) -> Loss:
    """Squared error of `values_B`, weighted by weights_B."""
    return _task_loss(model, lambda output, batch: squared_error(output, batch["values_B"], batch["weights_B"]))


def _task_loss(model: nn.Module, loss_of_output: Callable[[jax.Array, Any], LossAndMetrics]) -> Loss:
    def loss(params: Any, batch: Any, rng: jax.Array | None) -> LossAndMetrics:
        return loss_of_output(models.task_output(model, params, model_inputs(model, batch), rng), batch)

    return loss


def model_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Selects a model's inputs of a batch; an encoder-decoder reads the text at both ends (arXiv 1910.13461, 3.1)."""
    inputs = models.select_inputs(model, batch)
    if models.kind(model) == "seq2seq" and "source_BS" not in inputs:
        real = batch.get("segments_BT", jnp.ones_like(batch["inputs_BT"]))
        inputs |= {"source_BS": batch["inputs_BT"], "source_segments_BS": real}
    return inputs


def label_cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0
) -> LossAndMetrics:
    """Computes the cross-entropy of labels [...] over the last axis of logits, with label smoothing; metrics without.

    Logits may be -inf where there is no choice; smoothing ignores these.
    """
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    hits = jnp.argmax(logits, -1) == labels
    finite = jnp.isfinite(logits)
    uniform = -jnp.mean(jnp.where(finite, log_p, 0), -1, where=finite)
    smoothed = nats + smoothing * (uniform - nats) if smoothing else nats
    return jnp.sum(smoothed * weights), {"loss": jnp.sum(nats * weights), "accuracy": jnp.sum(hits * weights)}


def span_cross_entropy(
    logits_BT2: jax.Array, spans_B2: Any, weights_B: Any, segments_BT: Any, smoothing: float = 0.0
) -> LossAndMetrics:
    """Computes the loss of `span`; padding is no choice."""
    logits_B2T = logits_BT2.swapaxes(1, 2)
    if segments_BT is not None:
        logits_B2T = jnp.where((segments_BT > 0)[:, None], logits_B2T, -jnp.inf)
        # A row of padding alone keeps its logits, so that its loss is finite.
        logits_B2T = jnp.where((segments_BT > 0).any(1)[:, None, None], logits_B2T, logits_BT2.swapaxes(1, 2))
    loss, metrics = label_cross_entropy(logits_B2T, spans_B2, weights_B[:, None] / 2, smoothing)
    both_B = (jnp.argmax(logits_B2T, -1) == spans_B2).all(-1)
    return loss, metrics | {"accuracy": jnp.sum(both_B * weights_B)}


def squared_error(output_B: jax.Array, values_B: Any, weights_B: Any) -> LossAndMetrics:
    """Computes the sum of weight * (output - value)^2."""
    loss = jnp.sum((output_B - values_B) ** 2 * weights_B)
    return loss, {"loss": loss}
