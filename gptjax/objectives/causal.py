"""Next-token prediction."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from gptjax import models

Objective = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


def causal(model: nn.Module) -> Objective:
    """The objective of a decoder: each position's cross-entropy with the token that follows.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: the batch is a `gptjax.data.batches.Batch`, of packed documents where
      it has `segments_BT`; rng drives dropout, and None turns it off. `metrics["loss"]` is in nats, summed over
      positions by their weights; the loss adds the model's own penalty. The model's metrics come times the weight.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        said = models.forward(model, params, batch["inputs_BT"], batch.get("segments_BT"), dropout=rng)
        with jax.named_scope("loss"):  # by which profiles and cost tables know its operations
            nats = models.cross_entropy(model, said, batch["targets_BT"], batch["weights_BT"])
        weight = batch["weights_BT"].sum()
        metrics = {name: value * weight for name, value in said.metrics.items()}
        return nats + said.penalty * weight, {"loss": nats} | metrics

    return loss
