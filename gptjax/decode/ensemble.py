"""One model that speaks, or several as one: their logits become one distribution for the next token.

Pure functions of logits. Classifier-free guidance is an ensemble too: of a model that reads the prompt, and of the same
model that reads another one or nothing, by their logits with weights s and 1 - s (arXiv 2306.17806 eq. 7).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config.errors import ConfigError
from gptjax.decode.prefill import Decoder

Combine = Callable[[jax.Array, jax.Array], jax.Array]


def average_probabilities(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """log of the weighted mean of probabilities."""
    return jax.nn.logsumexp(logprobs_MBV, axis=0, b=weight_M[:, None, None])


def product_of_experts(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """The weighted sum of log-probabilities, not normalised: a product of experts."""
    return jnp.tensordot(weight_M, logprobs_MBV, axes=1)


def average_by_confidence(logprobs_MBV: jax.Array, weight_M: jax.Array) -> jax.Array:
    """As `by_probabilities`, with each weight times exp(-entropy) of its model: who is surer of a token counts more."""
    surprise_MBV = jnp.where(jnp.isneginf(logprobs_MBV), 0, logprobs_MBV)
    sureness_MB = jnp.sum(jnp.exp(logprobs_MBV) * surprise_MBV, axis=-1) + jnp.log(weight_M)[:, None]
    return jax.nn.logsumexp(logprobs_MBV + jax.nn.log_softmax(sureness_MB, axis=0)[..., None], axis=0)


COMBINES: dict[str, Combine] = {
    "probabilities": average_probabilities,
    "logits": product_of_experts,
    "token": average_by_confidence,
}


class Ensemble(NamedTuple):
    """Models over one vocabulary that choose each token together.

    Attributes:
      readers: the models, M of them.
      combine: of COMBINES; one model alone is taken as it is.
      weights: of each.
    """

    decoders: tuple[Decoder, ...]
    combine: str = "probabilities"
    weights: tuple[float, ...] = (1.0,)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The modules: static, where parameters are not."""
        return tuple(decoder.model for decoder in self.decoders)

    @property
    def params(self) -> tuple[Any, ...]:
        """Their parameters."""
        return tuple(decoder.params for decoder in self.decoders)


def make_ensemble(decoders: Sequence[Decoder], combine: str, weights: Sequence[float] = ()) -> Ensemble:
    """An ensemble; `weights` are divided by their sum, and are equal where there are none.

    Raises:
      ConfigError: another way to combine, weights that cannot be, models with different vocabularies.
    """
    if combine not in COMBINES:
        raise ConfigError(f"combine is {combine!r}; it must be one of {', '.join(COMBINES)}")
    weights = tuple(weights) or (1.0,) * len(decoders)
    if len(weights) != len(decoders) or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"there must be a weight above 0 for each of the {len(decoders)} models, not {weights}")
    sizes = {decoder.model.config.vocabulary for decoder in decoders}
    if len(sizes) > 1:
        raise ConfigError(f"models have different vocabularies ({sorted(sizes)} ids); they cannot speak together")
    return Ensemble(tuple(decoders), combine, tuple(weight / sum(weights) for weight in weights))


def with_guidance(decoder: Decoder, scale: float) -> Ensemble:
    """A model guided away from what it says without the prompt (arXiv 2306.17806 eq. 7); scale 1 is the model alone."""
    return Ensemble((decoder, decoder), "logits", (scale, 1 - scale))


def combine_logits(logits: Sequence[jax.Array], combine: str, weight_M: jax.Array) -> jax.Array:
    """Logits [B, V] of all speakers; log-probabilities where there are several."""
    if len(logits) == 1:
        return logits[0]
    logprobs_MBV = jnp.stack([jax.nn.log_softmax(logits_BV) for logits_BV in logits])
    return COMBINES[combine](logprobs_MBV, weight_M)
