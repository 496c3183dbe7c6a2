"""Models: token ids in, logits out. Pure Flax Linen modules, used only through `init` and `apply`.

Nothing here reads text, knows a loss or an optimizer, or names a mesh axis, and nothing here imports another
package of gptjax. Array names end in their shape, one letter an axis:

    B batch        T query/target length   S key/source length   N = B * T, flattened
    D model width  H query heads           G key/value heads     K head width
    F feed-forward width                   V vocabulary          L layers
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
from flax import linen as nn
from ml_collections import FrozenConfigDict

from gptjax.models.gpt import GPT, RESIDUALS
from gptjax.models.layers import ACTIVATIONS, NORMS, POSITIONS
from gptjax.models.mlp import MLPS

MODELS: dict[str, type[nn.Module]] = {"gpt": GPT}

# What the keys of `config.model` choose among.
CHOICES: dict[str, Mapping[str, Any]] = {
    "model.arch": MODELS,
    "model.positions": POSITIONS,
    "model.norm": NORMS,
    "model.norm_position": RESIDUALS,
    "model.mlp": MLPS,
    "model.activation": ACTIVATIONS,
}


def build(config: Any, dtype: str = "float32") -> nn.Module:
    """The model that `config` (`config.model` of a run, resolved) describes; computes in `dtype`."""
    return MODELS[config.arch](config=FrozenConfigDict(config), dtype=dtype)


def logits(model: nn.Module, params: Any, ids_BT: Any, dropout: jax.Array | None = None) -> jax.Array:
    """What the model says: float32 [B, T, V] for the token after each position.

    Args:
      model: as `build` gives it.
      params: of the model.
      ids_BT: token ids.
      dropout: the random key of dropout, or None for none.
    """
    rngs = None if dropout is None else {"dropout": dropout}
    return cast(jax.Array, model.apply({"params": params}, ids_BT, deterministic=dropout is None, rngs=rngs))
