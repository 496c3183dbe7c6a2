"""Contrastive learning of text embeddings: a text is told from others by another look at it, or by its partner."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, Loss, Reading


def whole_texts(row: Arrays, reading: Reading, rng: np.random.Generator) -> Arrays:
    """The row as one text to be embedded, or as a pair of texts where it has a source; `weights_B` says whether."""
    segments = rows.segments(row)
    given = {"inputs_BT": row["inputs_BT"], "segments_BT": segments}
    given |= {name: row[name] for name in ("source_BS", "source_segments_BS") if name in row}
    return given | {"weights_B": np.array(segments.any(), np.float32)}


def contrastive(model: nn.Module, options: Any) -> Loss:
    """SimCSE (arXiv 2104.08821): each embedding against its partner's among those of the device's rows.

    The partner is the row's source where it has one (section 4), else the same text under another dropout (eq. 4).
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
    """Sum of weight * -log softmax over second texts of cosine / temperature, at the own one (arXiv 2104.08821 eq. 1),
    and of weight where the own one is the nearest. What weighs 0 is no negative either."""
    # The bound is within the root, which has no gradient at 0.
    unit = [x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-16)) for x in (first_BD, second_BD)]
    scores_BB = unit[0] @ unit[1].T / temperature
    own_BB = jnp.eye(scores_BB.shape[0], dtype=bool)
    scores_BB = jnp.where(own_BB | (weights_B > 0), scores_BB, -jnp.inf)
    own_B = jnp.diagonal(scores_BB)
    nats_B = jax.nn.logsumexp(scores_BB, axis=-1) - own_B
    return jnp.sum(nats_B * weights_B), jnp.sum((own_B >= scores_BB.max(-1)) * weights_B)
