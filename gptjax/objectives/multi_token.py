"""Multi-token prediction: additional heads predict the tokens after the next one (arXiv 2404.19737)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss


def multi_token(model: nn.Module, options: Any) -> Loss:
    """Builds the sum of cross-entropies of the next token and the `model.mtp_depth` after it (arXiv 2404.19737 eq. 2).

    `metrics["loss"]` and "accuracy" are the next token's, comparable with other decoders'; "ahead_loss" is that of the
    later tokens, in nats.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = models.forward(model, params, models.select_inputs(model, batch), dropout=rng)
        targets, weights, segments = batch["targets_BT"], batch["weights_BT"], batch.get("segments_BT")
        total, metrics = tokens.loss_and_metrics(model, options, output, targets, weights)
        ahead = jnp.zeros(())
        for distance, x_BTD in enumerate(output.mtp_nBTD, 1):
            later = output._replace(x_BTD=x_BTD)
            shifted = shift_targets(targets, weights, segments, distance)
            loss = tokens.cross_entropy(model, options, later, *shifted)
            total, ahead = total + loss.loss, ahead + loss.nats
        return total, metrics | {"ahead_loss": ahead}

    return loss


def shift_targets(targets_BT: Any, weights_BT: Any, segments_BT: Any, distance: int) -> tuple[jax.Array, jax.Array]:
    """Shifts targets and weights by `distance` tokens; the weight is 0 beyond the row or in another segment."""
    T = targets_BT.shape[1]
    targets, weights = jnp.roll(targets_BT, -distance, axis=1), jnp.roll(weights_BT, -distance, axis=1)
    valid_BT = jnp.arange(T) < T - distance
    if segments_BT is not None:
        valid_BT &= jnp.roll(segments_BT, -distance, axis=1) == segments_BT
    return targets, weights * valid_BT
