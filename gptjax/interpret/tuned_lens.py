"""The tuned lens (arXiv 2303.08112): a logit lens with a trained affine translator of each layer's residual stream.

For decoders and encoders, whose parameters are frozen. Pure functions of (model, params, ids).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gptjax.interpret import lens, sites


class Translators(NamedTuple):
    """Affine translators x + x A + b of the stream before the first block and after each but the last."""

    a_LDD: jax.Array
    b_LD: jax.Array


def init_translators(model: nn.Module) -> Translators:
    """Initializes translators to the identity, with which the tuned lens is the logit lens.

    Raises:
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    L, D = lens.num_blocks(model), model.config.width  # type: ignore[attr-defined]
    return Translators(jnp.zeros((L, D, D)), jnp.zeros((L, D)))


def tuned_lens(model: nn.Module, params: Any, translators: Translators, ids_BT: Any, **more: Any) -> jax.Array:
    """Float32 logits [L + 1, B, T, V], as in gptjax.interpret.lens.logit_lens; the last are the model's."""

    @jax.jit
    def compute(params: Any, translators: Translators) -> jax.Array:
        stream_LBTD = sites.stream(model, params, ids_BT, **more)
        translated_LBTD = jnp.concatenate([translate(translators, stream_LBTD[:-1]), stream_LBTD[-1:]])
        return jax.lax.map(lambda x_BTD: lens.stream_logits(model, params, x_BTD), translated_LBTD)

    return compute(params, translators)


def translate(translators: Translators, stream_LBTD: jax.Array) -> jax.Array:
    """Applies the translators to the streams."""
    return stream_LBTD + jnp.einsum("lbtd,lde->lbte", stream_LBTD, translators.a_LDD) + translators.b_LD[:, None, None]


def train(
    model: nn.Module, params: Any, batches_nBT: Any, learning_rate: float = 1e-3, translators: Translators | None = None
) -> tuple[Translators, jax.Array]:
    """Trains translators by Adam.

    The loss is KL(model || lens) of the next-token distributions in nats, averaged over positions (section 3).

    Args:
      model: a decoder or an encoder.
      params: of the model; they are frozen.
      batches_nBT: token ids, one batch per step.
      learning_rate: of Adam.
      translators: initial translators; None: the identity.

    Returns:
      The translators, and the loss at each step, [n, L].
    """
    optimizer = optax.adam(learning_rate)

    def losses_L(translators: Translators, params: Any, ids_BT: jax.Array) -> jax.Array:
        stream_LBTD = jax.lax.stop_gradient(sites.stream(model, params, ids_BT))
        target_BTV = jax.nn.log_softmax(lens.stream_logits(model, params, stream_LBTD[-1]))

        def divergence(x_BTD: jax.Array) -> jax.Array:
            logprob_BTV = jax.nn.log_softmax(lens.stream_logits(model, params, x_BTD))
            return (jnp.exp(target_BTV) * (target_BTV - logprob_BTV)).sum(-1).mean()

        return jax.lax.map(divergence, translate(translators, stream_LBTD[:-1]))

    @jax.jit
    def run(params: Any, translators: Translators, batches_nBT: jax.Array) -> tuple[Translators, jax.Array]:
        def step(carry: Any, ids_BT: jax.Array) -> tuple[Any, jax.Array]:
            translators, state = carry
            losses, back = jax.vjp(lambda translators: losses_L(translators, params, ids_BT), translators)
            updates, state = optimizer.update(back(jnp.ones_like(losses))[0], state)
            return (optax.apply_updates(translators, updates), state), losses

        (translators, _), losses_nL = jax.lax.scan(step, (translators, optimizer.init(translators)), batches_nBT)
        return translators, losses_nL

    return run(params, translators or init_translators(model), jnp.asarray(batches_nBT))
