"""Losses of task heads' answers: about texts, tokens, spans, choices and numbers.

Labels are numbers here; names and missing ones are for whoever makes batches, who gives them the weight 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives.objective import Loss

Found = tuple[jax.Array, dict[str, jax.Array]]


def classification(model: nn.Module, options: Any) -> Loss:
    """Cross-entropy of `labels_B` among labels or choices, weighed by weights_B; "accuracy" is their share said."""
    return _of_answers(
        model, lambda said, batch: chosen(said, batch["labels_B"], batch["weights_B"], options.label_smoothing)
    )


def tagging(model: nn.Module, options: Any) -> Loss:
    """The same of each token's label, `labels_BT`, weighed by weights_BT."""
    return _of_answers(
        model, lambda said, batch: chosen(said, batch["labels_BT"], batch["weights_BT"], options.label_smoothing)
    )


def span(model: nn.Module, options: Any) -> Loss:
    """Mean of the cross-entropies of a span's first and last token, `spans_B2`, among the row's (arXiv 1810.04805 4.2),
    weighed by weights_B; "accuracy" counts rows of which both are right."""
    return _of_answers(
        model,
        lambda said, batch: ends(
            said, batch["spans_B2"], batch["weights_B"], batch.get("segments_BT"), options.label_smoothing
        ),
    )


def regression(model: nn.Module, options: Any) -> Loss:
    """Squared error of `values_B`, weighed by weights_B."""
    return _of_answers(model, lambda said, batch: squares(said, batch["values_B"], batch["weights_B"]))


def _of_answers(model: nn.Module, judged: Callable[[jax.Array, Any], Found]) -> Loss:
    def loss(params: Any, batch: Any, rng: jax.Array | None) -> Found:
        return judged(models.task_output(model, params, read_by(model, batch), rng), batch)

    return loss


def read_by(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What a model reads of texts; of an encoder-decoder both ends read them (arXiv 1910.13461 section 3.1)."""
    read = models.select_inputs(model, batch)
    if models.kind(model) == "seq2seq" and "source_BS" not in read:
        real = batch.get("segments_BT", jnp.ones_like(batch["inputs_BT"]))
        read |= {"source_BS": batch["inputs_BT"], "source_segments_BS": real}
    return read


def chosen(logits: jax.Array, labels: jax.Array, weights: jax.Array, smoothing: float = 0.0) -> Found:
    """Cross-entropy of labels [...] among the last axis of logits, with label smoothing, and metrics without.

    Logits may be -inf where there is no choice, and these have no share in the smoothing.
    """
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    hits = jnp.argmax(logits, -1) == labels
    there = jnp.isfinite(logits)
    even = -jnp.mean(jnp.where(there, log_p, 0), -1, where=there)
    smoothed = nats + smoothing * (even - nats) if smoothing else nats
    return jnp.sum(smoothed * weights), {"loss": jnp.sum(nats * weights), "accuracy": jnp.sum(hits * weights)}


def ends(logits_BT2: jax.Array, spans_B2: Any, weights_B: Any, segments_BT: Any, smoothing: float = 0.0) -> Found:
    """As of `span`; padding is no choice."""
    logits_B2T = logits_BT2.swapaxes(1, 2)
    if segments_BT is not None:
        logits_B2T = jnp.where((segments_BT > 0)[:, None], logits_B2T, -jnp.inf)
        # A row that is all padding chooses among all of it, so that it comes to something finite.
        logits_B2T = jnp.where((segments_BT > 0).any(1)[:, None, None], logits_B2T, logits_BT2.swapaxes(1, 2))
    loss, metrics = chosen(logits_B2T, spans_B2, weights_B[:, None] / 2, smoothing)
    both_B = (jnp.argmax(logits_B2T, -1) == spans_B2).all(-1)
    return loss, metrics | {"accuracy": jnp.sum(both_B * weights_B)}


def squares(said_B: jax.Array, values_B: Any, weights_B: Any) -> Found:
    """Sum of weight * (said - value)^2."""
    loss = jnp.sum((said_B - values_B) ** 2 * weights_B)
    return loss, {"loss": loss}
