"""Contrastive learning of text embeddings: a text's positive is a second view of it, or its partner in a pair."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, Loss, RowContext


def whole_texts(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Returns the row as one text to embed, or as a pair if it has a source; `weights_B` is 0 for a row of padding."""
    segments = rows.segment_ids(row)
    texts = {"inputs_BT": row["inputs_BT"], "segments_BT": segments}
    texts |= {name: row[name] for name in ("source_BS", "source_segments_BS") if name in row}
    return texts | {"weights_B": np.array(segments.any(), np.float32)}


def contrastive(model: nn.Module, options: Any) -> Loss:
    """SimCSE (arXiv 2104.08821): each embedding against its partner's, with those of the device's rows as negatives.

    The partner is the row's source if it has one (section 4), else the same text under another dropout mask (eq. 4).
    "accuracy" counts rows whose partner is the nearest.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        other = dict(batch)
        if "source_BS" in batch:
            other |= {"inputs_BT": batch["source_BS"], "segments_BT": batch["source_segments_BS"]}
        keys = (None, None) if rng is None else jax.random.split(rng)
        first, second = (
            models.task_output(model, params, models.select_inputs(model, one), key)
            for one, key in zip((batch, other), keys, strict=True)
        )
        nats, hits = info_nce(first, second, batch["weights_B"], options.temperature)
        return nats, {"loss": nats, "accuracy": hits}

    return loss


def info_nce(first_BD: Any, second_BD: Any, weights_B: Any, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Computes the sum of weight * -log softmax over second texts of cosine / temperature at the text's own partner
    (arXiv 2104.08821 eq. 1), and the sum of weight where that partner is the nearest. Rows of weight 0 are no
    negatives."""
    # The bound is inside the root, whose gradient at 0 is not finite.
    unit = [x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-16)) for x in (first_BD, second_BD)]
    scores_BB = unit[0] @ unit[1].T / temperature
    positive_BB = jnp.eye(scores_BB.shape[0], dtype=bool)
    scores_BB = jnp.where(positive_BB | (weights_B > 0), scores_BB, -jnp.inf)
    positive_B = jnp.diagonal(scores_BB)
    nats_B = jax.nn.logsumexp(scores_BB, axis=-1) - positive_B
    return jnp.sum(nats_B * weights_B), jnp.sum((positive_B >= scores_BB.max(-1)) * weights_B)
