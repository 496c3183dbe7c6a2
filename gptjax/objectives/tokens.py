"""Losses with a target token at each position: of decoders, masked encoders and encoder-decoders."""

from typing import Any

import jax
from flax import linen as nn

from gptjax import models
from gptjax.models.kernels.reference import TokenLoss
from gptjax.objectives.objective import Loss


def token_prediction(model: nn.Module, options: Any = None) -> Loss:
    """Builds the loss of a model that predicts the target at each position.

    Args:
      model: a model of any kind, which selects its inputs from a batch.
      options: `config.objective`, of which label_smoothing and z_loss are read; None: both are 0.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: "loss" is the cross-entropy itself, in nats, and "accuracy" counts
      targets that are the most likely token, both sums over positions weighted by weights_BT. The loss adds label
      smoothing, the z-loss and the model's own penalty. The model's metrics are multiplied by the total weight.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = models.forward(model, params, models.select_inputs(model, batch), dropout=rng)
        return loss_and_metrics(model, options, output, batch["targets_BT"], batch["weights_BT"])

    return loss


def loss_and_metrics(
    model: nn.Module, options: Any, output: models.Output, targets_BT: Any, weights_BT: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes loss and metrics of a model's output; see `token_prediction`."""
    loss = cross_entropy(model, options, output, targets_BT, weights_BT)
    weight = weights_BT.sum()
    metrics = {name: value * weight for name, value in output.metrics.items()}
    return loss.loss + output.penalty * weight, {"loss": loss.nats, "accuracy": loss.hits} | metrics


def cross_entropy(model: nn.Module, options: Any, output: models.Output, targets_BT: Any, weights_BT: Any) -> TokenLoss:
    """Computes the cross-entropy of a model's output; see `token_prediction`."""
    regularization = (options.label_smoothing, options.z_loss) if options is not None else (0.0, 0.0)
    with jax.named_scope("loss"):  # profiles and cost tables identify its operations by it
        return models.token_loss(model, output, targets_BT, weights_BT, *regularization)
