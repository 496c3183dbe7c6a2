"""What a neuron answers to: the places in some texts where it is largest. A pure function of (model, params, ids)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.inspect import sites


class Examples(NamedTuple):
    """Places where neurons are largest, the largest first; [neurons, k] each."""

    values: np.ndarray
    rows: np.ndarray  # of ids_BT
    positions: np.ndarray


def top_examples(
    model: nn.Module, params: Any, ids_BT: Any, site: str, neurons: Any, k: int = 10, **more: Any
) -> Examples:
    """The k places where each neuron is largest.

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: texts that are searched.
      site: whose columns neurons are: "block_0/mlp/down.in", or any other [B, T, ...].
      neurons: their columns.
      k: how many places, at most B * T.
      **more: what else the model reads, by name.

    Raises:
      DataError: no such site.
    """
    columns, T = jnp.ravel(jnp.asarray(neurons)), jnp.shape(ids_BT)[1]

    @jax.jit
    def found(params: Any) -> tuple[jax.Array, jax.Array]:
        x_BTF = sites.capture(model, params, ids_BT, site.replace(".", r"\."), **more)[site]
        best: tuple[jax.Array, jax.Array] = jax.lax.top_k(x_BTF.reshape(-1, x_BTF.shape[-1]).T[columns], k)
        return best

    values, places = (np.asarray(x) for x in found(params))
    return Examples(values, places // T, places % T)
