"""Unlikelihood training against repetition (arXiv 1908.04319)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.options import option
from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss

SMALLEST = 1e-5  # of 1 - p, as in the authors' code, so that the gradient stays finite


@dataclass(frozen=True)
class UnlikelihoodOptions:
    """Unlikelihood training (train.objective=unlikelihood, arXiv 1908.04319)."""

    alpha: float = option(1.0, "weight of the unlikelihood of earlier tokens, beside the cross-entropy")


def unlikelihood(model: nn.Module, options: Any) -> Loss:
    """Builds the cross-entropy of the next token, plus alpha times the unlikelihood of the tokens before it (arXiv
    1908.04319 eq. 3 and 5): of each different token that the text already has, except the target.

    `metrics["loss"]` is the cross-entropy alone, and "unlikelihood" the other term, in nats.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = models.forward(model, params, models.select_inputs(model, batch), dropout=rng)
        total, metrics = tokens.loss_and_metrics(model, options, output, batch["targets_BT"], batch["weights_BT"])
        logits_BTV = models.next_logits(model, output.x_BTD, output.unembedding_VD)
        candidates_BTS = negative_candidates(batch["inputs_BT"], batch["targets_BT"], batch.get("segments_BT"))
        repeats = repeated(logits_BTV, batch["inputs_BT"], candidates_BTS, batch["weights_BT"])
        return total + options.unlikelihood.alpha * repeats, metrics | {"unlikelihood": repeats}

    return loss


def negative_candidates(inputs_BT: Any, targets_BT: Any, segments_BT: Any = None) -> jax.Array:
    """Returns bool [B, T, S]: True where input s is the first of its token in the document, no later than position t,
    and not t's target.
    """
    T = inputs_BT.shape[1]
    earlier_TS = jnp.tril(jnp.ones((T, T), bool))
    within_BTS = jnp.ones((1, T, T), bool) if segments_BT is None else segments_BT[:, :, None] == segments_BT[:, None]
    same_BTS = (inputs_BT[:, :, None] == inputs_BT[:, None]) & within_BTS
    first_BS = ~(same_BTS & jnp.tril(earlier_TS, -1)).any(-1)
    return within_BTS & earlier_TS & first_BS[:, None] & (inputs_BT[:, None] != targets_BT[:, :, None])


def repeated(logits_BTV: Any, inputs_BT: Any, candidates_BTS: Any, weights_BT: Any) -> jax.Array:
    """Computes the sum of weight * -log(1 - p) over the candidates of each position."""
    at_BTS = jnp.broadcast_to(inputs_BT[:, None], candidates_BTS.shape)
    logp_BTS = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), at_BTS, axis=-1)
    nats_BTS = -jnp.log(jnp.maximum(1 - jnp.exp(logp_BTS), SMALLEST))
    return jnp.sum(jnp.where(candidates_BTS, nats_BTS, 0).sum(-1) * weights_BT)
