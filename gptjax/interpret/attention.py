"""Attention weights by layer and head, as the model computes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError


def maps(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Self-attention weights, float32 [L, B, H, T, T]: query, then key.

    Args:
      model: a decoder or an encoder with attention.
      params: of the model.
      ids_BT: token ids.
      **more: other inputs of the model, by name.

    Raises:
      ConfigError: the model is not a decoder or an encoder with attention.
    """
    if models.kind(model) == "seq2seq" or models.is_recurrent(model.config):  # type: ignore[attr-defined]
        raise ConfigError("attention maps need a decoder or an encoder with attention; see gptjax.interpret.alignment")
    return jnp.stack(weights(model, params, {"ids_BT": jnp.asarray(ids_BT), **more}, "weights_BHTT"))


def weights(model: nn.Module, params: Any, inputs: Mapping[str, Any], name: str) -> list[jax.Array]:
    """Attention weights by layer; `name` is "weights_BHTT" for self-attention, "weights_BHTS" for cross-attention."""
    model, params = models.unroll_layers(model, params)

    @jax.jit
    def sown(params: Any) -> Any:
        def features(model: Any) -> Any:
            return model.features(**inputs)

        return model.apply({"params": params}, method=features, mutable=["attention"])[1]

    leaves = jax.tree_util.tree_leaves_with_path(sown(params))
    numbered = [(_block(path), leaf) for path, leaf in leaves if name in _keys(path)]
    return [leaf for _, leaf in sorted(numbered, key=lambda pair: pair[0])]


def _keys(path: Any) -> list[str]:
    return [str(getattr(key, "key", "")) for key in path]


def _block(path: Any) -> int:
    """The number of the block in a path; 0 if there are no blocks."""
    blocks = [name for name in _keys(path) if name.startswith("block_")]
    return int(blocks[0].removeprefix("block_")) if blocks else 0
