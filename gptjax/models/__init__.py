"""Models: token ids in, logits out. Pure Flax Linen modules, used only through `init` and `apply`.

Nothing here reads text, knows an objective or an optimizer, or names a mesh axis, and nothing here imports another
package of gptjax. Array names end in their shape, one letter an axis:

    B batch        T query/target length   S key/source length   N = B * T, flattened
    D model width  H query heads           G key/value heads     K head width
    F feed-forward width                   V vocabulary          L layers
    E experts      k experts per token
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax.models.gpt import GPT, REMATS, RESIDUALS
from gptjax.models.kernels import KERNELS, resolved
from gptjax.models.layers import ACTIVATIONS, GATES, NORMS, RESIDUAL_INITS
from gptjax.models.mlp import MLPS
from gptjax.models.positions import POSITIONS, ROTARY_SCALINGS

MODELS: dict[str, type[nn.Module]] = {"gpt": GPT}

# What the keys of `config.model` choose among.
CHOICES: dict[str, Mapping[str, Any]] = {
    "model.arch": MODELS,
    "model.positions": POSITIONS,
    "model.rotary.scaling": ROTARY_SCALINGS,
    "model.norm": NORMS,
    "model.norm_position": RESIDUALS,
    "model.mlp": MLPS,
    "model.activation": ACTIVATIONS | GATES,
    "model.residual_init": RESIDUAL_INITS,
    "model.remat": REMATS,
    "model.kernels": {"auto": None} | KERNELS,
}


class Output(NamedTuple):
    """A forward pass: what the head reads and the head's rows, which make logits, and what the model says of itself."""

    x_BTD: jax.Array
    table_VD: jax.Array  # float32
    penalty: jax.Array  # to be added to the loss per token, nats; 0 but for mixtures of experts
    metrics: dict[str, jax.Array]  # means over layers, by name


def build(config: Any, dtype: str = "float32", divided: Collection[str] = ()) -> nn.Module:
    """The model that `config` (`config.model` of a run, resolved) describes.

    Args:
      config: see configs/base.py.
      dtype: of the arithmetic.
      divided: what is divided among devices, as gptjax.models.kernels.resolved takes it.
    """
    config = ConfigDict(config)
    config.kernels = resolved(config.kernels, divided)
    return MODELS[config.arch](config=FrozenConfigDict(config), dtype=dtype)


def shapes(model: nn.Module) -> Any:
    """The tree of its parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def forward(
    model: nn.Module, params: Any, ids_BT: Any, segments_BT: Any = None, dropout: jax.Array | None = None
) -> Output:
    """What the model makes of token ids.

    Args:
      model: as `build` gives it.
      params: of the model.
      ids_BT: token ids.
      segments_BT: where rows hold several documents, the number of each token's, int32, in runs of equal ones, 0 for
        padding; no attention and no position crosses from one to another. None: a row is one document.
      dropout: the random key of dropout, or None for none.
    """

    def both(model: Any) -> tuple[jax.Array, jax.Array]:
        return model.read(ids_BT, segments_BT, deterministic=dropout is None), model.table()

    rngs = None if dropout is None else {"dropout": dropout}
    (x_BTD, table_VD), said = model.apply({"params": params}, rngs=rngs, mutable=["losses", "metrics"], method=both)
    penalty = sum(_by_name(said.get("losses", {}), jnp.sum).values(), start=jnp.zeros(()))
    return Output(x_BTD, table_VD, penalty, _by_name(said.get("metrics", {}), jnp.mean))


def _by_name(tree: Any, over_layers: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.setdefault(path[-1].key, []).append(jnp.ravel(leaf))
    return {name: over_layers(jnp.concatenate(leaves)) for name, leaves in found.items()}


def cross_entropy(model: nn.Module, said: Output, targets_BT: Any, weights_BT: Any) -> jax.Array:
    """Sum over positions of weight * nats that the model needs for the target; see gptjax.models.kernels.plain."""
    c = model.config
    return KERNELS[c.kernels].cross_entropy(said.x_BTD, said.table_VD, targets_BT, weights_BT, c.logit_softcap)


def logits(model: nn.Module, params: Any, ids_BT: Any, segments_BT: Any = None) -> jax.Array:
    """What the model says, without dropout: float32 [B, T, V] for the token after each position; see `forward`."""
    logits_BTV: Any = model.apply({"params": params}, ids_BT, segments_BT)
    return logits_BTV
