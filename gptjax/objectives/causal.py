"""Next-token prediction."""

from typing import Any

import jax
from flax import linen as nn

from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss


def causal(model: nn.Module, options: Any = None) -> Loss:
    """Builds the loss of a decoder: each position's cross-entropy with the next token.

    Returns:
      A loss as of gptjax.objectives.tokens.token_prediction, without its "accuracy". The batch is a
      `gptjax.data.batches.Batch`, of packed documents where it has `segments_BT`.
    """
    with_accuracy = tokens.token_prediction(model, options)

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, metrics = with_accuracy(params, batch, rng)
        return total, {name: value for name, value in metrics.items() if name != "accuracy"}

    return loss
