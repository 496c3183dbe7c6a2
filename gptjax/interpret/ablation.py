"""What a measure loses when a head or a sublayer of a decoder or an encoder adds nothing; gptjax.interpret.sites."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.interpret import sites
from gptjax.interpret.lens import blocks
from gptjax.interpret.measures import Measure

SUBLAYERS = ("attention", "mlp")


def heads_site(layer: int) -> str:
    """Where the heads of a layer are side by side, [B, T, H * K]."""
    return f"block_{layer}/attention/out.in"


def columns(model: nn.Module, head: Any) -> jax.Array:
    """Which columns at `heads_site` are the head's: 1, else 0, [H * K]."""
    config = model.config  # type: ignore[attr-defined]
    return (jnp.arange(config.heads * config.head_width) // config.head_width == head).astype(jnp.float32)


def without_heads(model: nn.Module, heads: list[tuple[int, int]]) -> dict[str, sites.Change]:
    """The changes with which heads, each a layer and its number there, write zeros; for `sites.forward`."""
    keep_L: dict[int, jax.Array] = {}
    for layer, head in heads:
        keep_L[layer] = keep_L.get(layer, jnp.ones(())) * (1 - columns(model, head))
    return {heads_site(layer): partial(jnp.multiply, keep) for layer, keep in keep_L.items()}


def without_layers(layers: list[int]) -> dict[str, sites.Change]:
    """The changes with which blocks add nothing to the residual stream."""
    return {f"block_{layer}/{name}": jnp.zeros_like for layer in layers for name in SUBLAYERS}


def heads(model: nn.Module, params: Any, ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure without each head less the measure, [L, H, B].

    Raises:
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    L, H = blocks(model), model.config.heads  # type: ignore[attr-defined]

    @jax.jit
    def lost(params: Any) -> jax.Array:
        def without(number: jax.Array) -> jax.Array:
            def change(layer: int) -> sites.Change:
                return lambda x: x * (1 - columns(model, number % H) * (number // H == layer)).astype(x.dtype)

            changes = {heads_site(layer): change(layer) for layer in range(L)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        whole_B = measure(sites.forward(model, params, ids_BT, **more).logits_BTV)
        return (jax.lax.map(without, jnp.arange(L * H)) - whole_B).reshape(L, H, -1)

    return lost(params)


def layers(model: nn.Module, params: Any, ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure without each sublayer less the measure, [L, 2, B]: attention, MLP.

    Raises:
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    names = [f"block_{layer}/{name}" for layer in range(blocks(model)) for name in SUBLAYERS]

    @jax.jit
    def lost(params: Any) -> jax.Array:
        def without(number: jax.Array) -> jax.Array:
            def change(own: int) -> sites.Change:
                return lambda x: x * (number != own).astype(x.dtype)

            changes = {name: change(own) for own, name in enumerate(names)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        whole_B = measure(sites.forward(model, params, ids_BT, **more).logits_BTV)
        return (jax.lax.map(without, jnp.arange(len(names))) - whole_B).reshape(-1, 2, whole_B.shape[0])

    return lost(params)
