"""Multi-token prediction: heads of their own say the tokens after the next one (arXiv 2404.19737)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss


def multi_token(model: nn.Module, options: Any) -> Loss:
    """The sum of cross-entropies of the next token and of the `model.mtp_depth` after it (arXiv 2404.19737 eq. 2).

    `metrics["loss"]` and "accuracy" are the next token's, so that they compare with other decoders'; "ahead_loss" is
    the others' in nats.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        said = models.forward(model, params, models.select_inputs(model, batch), dropout=rng)
        targets, weights, segments = batch["targets_BT"], batch["weights_BT"], batch.get("segments_BT")
        whole, metrics = tokens.of_output(model, options, said, targets, weights)
        ahead = jnp.zeros(())
        for distance, x_BTD in enumerate(said.mtp_nBTD, 1):
            later = said._replace(x_BTD=x_BTD)
            asked = shifted(targets, weights, segments, distance)
            found = tokens.loss_of(model, options, later, *asked)
            whole, ahead = whole + found.loss, ahead + found.nats
        return whole, metrics | {"ahead_loss": ahead}

    return loss


def shifted(targets_BT: Any, weights_BT: Any, segments_BT: Any, distance: int) -> tuple[jax.Array, jax.Array]:
    """The targets so many tokens later, and their weights: 0 where these are of another segment, or of none."""
    T = targets_BT.shape[1]
    targets, weights = jnp.roll(targets_BT, -distance, axis=1), jnp.roll(weights_BT, -distance, axis=1)
    there_BT = jnp.arange(T) < T - distance
    if segments_BT is not None:
        there_BT &= jnp.roll(segments_BT, -distance, axis=1) == segments_BT
    return targets, weights * there_BT
