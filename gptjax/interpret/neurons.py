"""What a neuron answers to: the places in some texts where it is largest. Pure functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.interpret import sites


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
    columns = jnp.ravel(jnp.asarray(neurons))

    @jax.jit
    def captured(params: Any) -> jax.Array:
        x_BTF = sites.capture(model, params, ids_BT, site, **more)[site]
        return x_BTF.reshape(*jnp.shape(ids_BT), -1)[..., columns]

    return largest(captured(params), k)


def largest(x_BTF: Any, k: int = 10) -> Examples:
    """The k places where each column is largest: neurons, or features that gptjax.interpret.sparse has encoded."""
    x_BTF = jnp.asarray(x_BTF)
    _, T, F = x_BTF.shape
    values, position_info = (np.asarray(x) for x in jax.lax.top_k(x_BTF.reshape(-1, F).T, k))
    return Examples(values, position_info // T, position_info % T)
