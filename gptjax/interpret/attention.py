"""Where tokens look: attention weights by layer and head, as the model computes them. Draws nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError


def maps(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Attention of each token to those of its own sequence, float32 [L, B, H, T, T]: query, then key.

    Args:
      model: a decoder or an encoder with attention.
      params: of the model.
      ids_BT: token ids.
      **more: what else the model reads, by name.

    Raises:
      ConfigError: no such model.
    """
    if models.kind(model) == "seq2seq" or models.is_recurrent(model.config):  # type: ignore[attr-defined]
        raise ConfigError(
            "attention maps are of a decoder or an encoder with attention; see gptjax.interpret.alignment"
        )
    return jnp.stack(weights(model, params, {"ids_BT": jnp.asarray(ids_BT), **more}, "weights_BHTT"))


def weights(model: nn.Module, params: Any, read: Mapping[str, Any], name: str) -> list[jax.Array]:
    """Attention weights by layer; `name`: "weights_BHTT" to the own sequence, "weights_BHTS" to a memory."""
    model, params = models.unroll_layers(model, params)

    @jax.jit
    def attended(params: Any) -> Any:
        def features(model: Any) -> Any:
            return model.features(**read)

        return model.apply({"params": params}, method=features, mutable=["attention"])[1]

    leaves = jax.tree_util.tree_leaves_with_path(attended(params))
    own = [(_block(path), leaf) for path, leaf in leaves if name in _keys(path)]
    return [leaf for _, leaf in sorted(own, key=lambda pair: pair[0])]


def _keys(path: Any) -> list[str]:
    return [str(getattr(key, "key", "")) for key in path]


def _block(path: Any) -> int:
    """The number of the block that something was kept in; 0 where there are no blocks."""
    found = [name for name in _keys(path) if name.startswith("block_")]
    return int(found[0].removeprefix("block_")) if found else 0
