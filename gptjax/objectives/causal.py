"""Next-token prediction."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models

Objective = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def causal(model: nn.Module) -> Objective:
    """The objective of a decoder: each position's cross-entropy with the token that follows.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: the batch is a `gptjax.data.batches.Batch`; rng drives dropout, and
      None turns it off. `metrics["loss"]` is in nats, summed over positions by their weights; the loss adds the
      model's own penalty. The model's metrics come times the weight.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        said = models.forward(model, params, batch["inputs_BT"], dropout=rng)
        with jax.named_scope("loss"):  # by which profiles and cost tables know its operations
            nats = (cross_entropy(said.logits_BTV, batch["targets_BT"]) * batch["weights_BT"]).sum()
        weight = batch["weights_BT"].sum()
        metrics = {name: value * weight for name, value in said.metrics.items()}
        return nats + said.penalty * weight, {"loss": nats} | metrics

    return loss
