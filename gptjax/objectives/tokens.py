"""Losses that ask for a token at each position: of decoders, masked encoders and encoder-decoders alike."""

from typing import Any

import jax
from flax import linen as nn

from gptjax import models
from gptjax.models.kernels.reference import TokenLoss
from gptjax.objectives.objective import Loss


def predicted(model: nn.Module, options: Any = None) -> Loss:
    """The loss of a model that is asked for the target at each position.

    Args:
      model: of any kind; it reads what of a batch it can.
      options: `config.objective`, of which label_smoothing and z_loss are read; None: as if both were 0.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: "loss" is the cross-entropy itself, in nats, and "accuracy" how often
      the target is the likeliest token, both summed over positions by weights_BT. The loss adds label smoothing, the
      z-loss and the model's own penalty. The model's metrics come times the weight.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        said = models.forward(model, params, models.select_inputs(model, batch), dropout=rng)
        return of_output(model, options, said, batch["targets_BT"], batch["weights_BT"])

    return loss


def of_output(
    model: nn.Module, options: Any, said: models.Output, targets_BT: Any, weights_BT: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of what a model said, as of `predicted`."""
    found = loss_of(model, options, said, targets_BT, weights_BT)
    weight = weights_BT.sum()
    metrics = {name: value * weight for name, value in said.metrics.items()}
    return found.loss + said.penalty * weight, {"loss": found.nats, "accuracy": found.hits} | metrics


def loss_of(model: nn.Module, options: Any, said: models.Output, targets_BT: Any, weights_BT: Any) -> TokenLoss:
    """Cross-entropy of what a model said, as of `predicted`."""
    softened = (options.label_smoothing, options.z_loss) if options is not None else (0.0, 0.0)
    with jax.named_scope("loss"):  # by which profiles and cost tables know its operations
        return models.token_loss(model, said, targets_BT, weights_BT, *softened)
