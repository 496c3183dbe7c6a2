"""The tuned lens (arXiv 2303.08112): a lens with an affine map of each layer's stream to the last one's, which learns.

The maps are trained, the model is not. Of decoders and encoders. Pure functions of (model, params, ids).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gptjax.interpret import lens, sites


class Maps(NamedTuple):
    """Of the stream before the first block and after each but the last: x + x A + b."""

    a_LDD: jax.Array
    b_LD: jax.Array


def first_maps(model: nn.Module) -> Maps:
    """Maps that change nothing, with which the tuned lens is the logit lens.

    Raises:
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    L, D = lens.blocks(model), model.config.width  # type: ignore[attr-defined]
    return Maps(jnp.zeros((L, D, D)), jnp.zeros((L, D)))


def tuned_lens(model: nn.Module, params: Any, maps: Maps, ids_BT: Any, **more: Any) -> jax.Array:
    """Float32 logits [L + 1, B, T, V], as of gptjax.interpret.lens.logit_lens; the last are the model's."""

    @jax.jit
    def of(params: Any, maps: Maps) -> jax.Array:
        stream_LBTD = sites.stream(model, params, ids_BT, **more)
        moved_LBTD = jnp.concatenate([moved(maps, stream_LBTD[:-1]), stream_LBTD[-1:]])
        return jax.lax.map(lambda x_BTD: lens.read_out(model, params, x_BTD), moved_LBTD)

    return of(params, maps)


def moved(maps: Maps, stream_LBTD: jax.Array) -> jax.Array:
    """The streams as their maps have them."""
    return stream_LBTD + jnp.einsum("lbtd,lde->lbte", stream_LBTD, maps.a_LDD) + maps.b_LD[:, None, None]


def trained(
    model: nn.Module, params: Any, batches_nBT: Any, learning_rate: float = 1e-3, maps: Maps | None = None
) -> tuple[Maps, jax.Array]:
    """Maps trained by Adam, and the loss at each step [n, L].

    The loss is KL(the model's word at a position || the lens's), nats, the mean over positions (section 3).

    Args:
      model: a decoder or an encoder.
      params: of the model; they stay.
      batches_nBT: token ids, a step each.
      learning_rate: of Adam.
      maps: to go on from; None: those that change nothing.
    """
    optimizer = optax.adam(learning_rate)

    def losses_L(maps: Maps, params: Any, ids_BT: jax.Array) -> jax.Array:
        stream_LBTD = jax.lax.stop_gradient(sites.stream(model, params, ids_BT))
        right_BTV = jax.nn.log_softmax(lens.read_out(model, params, stream_LBTD[-1]))

        def divergence(x_BTD: jax.Array) -> jax.Array:
            said_BTV = jax.nn.log_softmax(lens.read_out(model, params, x_BTD))
            return (jnp.exp(right_BTV) * (right_BTV - said_BTV)).sum(-1).mean()

        return jax.lax.map(divergence, moved(maps, stream_LBTD[:-1]))

    @jax.jit
    def train(params: Any, maps: Maps, batches_nBT: jax.Array) -> tuple[Maps, jax.Array]:
        def step(carry: Any, ids_BT: jax.Array) -> tuple[Any, jax.Array]:
            maps, state = carry
            losses, back = jax.vjp(lambda maps: losses_L(maps, params, ids_BT), maps)
            updates, state = optimizer.update(back(jnp.ones_like(losses))[0], state)
            return (optax.apply_updates(maps, updates), state), losses

        (maps, _), losses_nL = jax.lax.scan(step, (maps, optimizer.init(maps)), batches_nBT)
        return maps, losses_nL

    return train(params, maps or first_maps(model), jnp.asarray(batches_nBT))
