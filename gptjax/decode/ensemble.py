"""Ensembles of models: their logits are combined into one distribution for the next token.

Pure functions of logits. Classifier-free guidance is an ensemble too: of the model with the prompt and the same model
with a negative prompt or none, combined by logits with weights s and 1 - s (arXiv 2306.17806 eq. 7).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config.errors import ConfigError
from gptjax.decode.prefill import Decoder

CombineFn = Callable[[jax.Array, jax.Array], jax.Array]


def average_probabilities(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """Returns the logarithm of the weighted mean of probabilities, [B, V]."""
    return jax.nn.logsumexp(logprobs_MBV, axis=0, b=weight_M[:, None, None])


def product_of_experts(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """Returns the weighted sum of log-probabilities, [B, V], unnormalized: a product of experts."""
    return jnp.tensordot(weight_M, logprobs_MBV, axes=1)


def average_by_confidence(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """Averages probabilities with each weight multiplied by exp(-entropy) of its model's distribution, [B, V]."""
    finite_logprobs_MBV = jnp.where(jnp.isneginf(logprobs_MBV), 0, logprobs_MBV)
    confidence_MB = jnp.sum(jnp.exp(logprobs_MBV) * finite_logprobs_MBV, axis=-1) + jnp.log(weight_M)[:, None]
    return jax.nn.logsumexp(logprobs_MBV + jax.nn.log_softmax(confidence_MB, axis=0)[..., None], axis=0)


COMBINE_FNS: dict[str, CombineFn] = {
    "probabilities": average_probabilities,
    "logits": product_of_experts,
    "token": average_by_confidence,
}


class Ensemble(NamedTuple):
    """Models with one vocabulary that are combined for each token.

    Attributes:
      readers: the models, M of them.
      combine: a key of COMBINE_FNS; the logits of a single model are used unchanged.
      weights: of each model.
    """

    decoders: tuple[Decoder, ...]
    combine: str = "probabilities"
    weights: tuple[float, ...] = (1.0,)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Linen modules, which are static arguments."""
        return tuple(decoder.model for decoder in self.decoders)

    @property
    def params(self) -> tuple[Any, ...]:
        """Parameters of each model."""
        return tuple(decoder.params for decoder in self.decoders)


def make_ensemble(decoders: Sequence[Decoder], combine: str, weights: Sequence[float] = ()) -> Ensemble:
    """Returns an ensemble of decoders.

    Args:
      decoders: the models.
      combine: a key of COMBINE_FNS.
      weights: of each model, divided by their sum; equal weights where there are none.

    Raises:
      ConfigError: an unknown `combine`, invalid weights, or models with different vocabularies.
    """
    if combine not in COMBINE_FNS:
        raise ConfigError(f"combine is {combine!r}; it must be one of {', '.join(COMBINE_FNS)}")
    weights = tuple(weights) or (1.0,) * len(decoders)
    if len(weights) != len(decoders) or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"there must be a weight above 0 for each of the {len(decoders)} models, not {weights}")
    sizes = {decoder.model.config.vocabulary for decoder in decoders}
    if len(sizes) > 1:
        raise ConfigError(f"models have different vocabularies ({sorted(sizes)} ids); they cannot form an ensemble")
    return Ensemble(tuple(decoders), combine, tuple(weight / sum(weights) for weight in weights))


def with_guidance(decoder: Decoder, scale: float) -> Ensemble:
    """Returns a model with classifier-free guidance (arXiv 2306.17806 eq. 7); scale 1 is the model alone."""
    return Ensemble((decoder, decoder), "logits", (scale, 1 - scale))


def combine_logits(logits: Sequence[jax.Array], combine: str, weight_M: jax.Array) -> jax.Array:
    """Combines logits [B, V] of each model; returns log-probabilities where there are several."""
    if len(logits) == 1:
        return logits[0]
    logprobs_MBV = jnp.stack([jax.nn.log_softmax(logits_BV) for logits_BV in logits])
    return COMBINE_FNS[combine](logprobs_MBV, weight_M)
