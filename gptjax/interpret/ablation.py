"""Ablation: the change of a measure when a head or a sublayer of a decoder or an encoder outputs zeros."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.interpret import sites
from gptjax.interpret.lens import num_blocks
from gptjax.interpret.measures import Measure

SUBLAYERS = ("attention", "mlp")


def heads_site(layer: int) -> str:
    """The site of the concatenated heads of a layer, [B, T, H * K]."""
    return f"block_{layer}/attention/out.in"


def head_mask(model: nn.Module, head: Any) -> jax.Array:
    """1 for the columns of a head at `heads_site`, otherwise 0, [H * K]."""
    config = model.config  # type: ignore[attr-defined]
    return (jnp.arange(config.heads * config.head_width) // config.head_width == head).astype(jnp.float32)


def ablate_heads(model: nn.Module, heads: list[tuple[int, int]]) -> dict[str, sites.Change]:
    """Changes for `sites.forward` that zero heads, each given by layer and number."""
    masks: dict[int, jax.Array] = {}
    for layer, head in heads:
        masks[layer] = masks.get(layer, jnp.ones(())) * (1 - head_mask(model, head))
    return {heads_site(layer): partial(jnp.multiply, mask) for layer, mask in masks.items()}


def ablate_layers(layers: list[int]) -> dict[str, sites.Change]:
    """Changes for `sites.forward` that zero both sublayers of blocks."""
    return {f"block_{layer}/{name}": jnp.zeros_like for layer in layers for name in SUBLAYERS}


def heads(model: nn.Module, params: Any, ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure without each head minus the measure of the whole model, [L, H, B].

    Raises:
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    L, H = num_blocks(model), model.config.heads  # type: ignore[attr-defined]

    @jax.jit
    def difference(params: Any) -> jax.Array:
        def without(number: jax.Array) -> jax.Array:
            def change(layer: int) -> sites.Change:
                return lambda x: x * (1 - head_mask(model, number % H) * (number // H == layer)).astype(x.dtype)

            changes = {heads_site(layer): change(layer) for layer in range(L)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        whole_B = measure(sites.forward(model, params, ids_BT, **more).logits_BTV)
        return (jax.lax.map(without, jnp.arange(L * H)) - whole_B).reshape(L, H, -1)

    return difference(params)


def layers(model: nn.Module, params: Any, ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure without each sublayer minus the measure of the whole model, [L, 2, B]: attention, MLP.

    Raises:
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    names = [f"block_{layer}/{name}" for layer in range(num_blocks(model)) for name in SUBLAYERS]

    @jax.jit
    def difference(params: Any) -> jax.Array:
        def without(number: jax.Array) -> jax.Array:
            def change(index: int) -> sites.Change:
                return lambda x: x * (number != index).astype(x.dtype)

            changes = {name: change(index) for index, name in enumerate(names)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        whole_B = measure(sites.forward(model, params, ids_BT, **more).logits_BTV)
        return (jax.lax.map(without, jnp.arange(len(names))) - whole_B).reshape(-1, 2, whole_B.shape[0])

    return difference(params)
