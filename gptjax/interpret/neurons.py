"""Maximally activating examples of neurons. Pure functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.interpret import sites


class Examples(NamedTuple):
    """The top activations of neurons and their positions, largest first; [neurons, k] each."""

    values: np.ndarray
    rows: np.ndarray  # of ids_BT
    positions: np.ndarray


def top_examples(
    model: nn.Module, params: Any, ids_BT: Any, site: str, neurons: Any, k: int = 10, **more: Any
) -> Examples:
    """Finds the top k activations of each neuron.

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: the texts to search.
      site: the site of the neurons, such as "block_0/mlp/down.in", [B, T, ...].
      neurons: their columns.
      k: number of activations, at most B * T.
      **more: other inputs of the model, by name.

    Raises:
      DataError: the model has no such site.
    """
    columns = jnp.ravel(jnp.asarray(neurons))

    @jax.jit
    def captured(params: Any) -> jax.Array:
        x_BTF = sites.capture(model, params, ids_BT, site, **more)[site]
        return x_BTF.reshape(*jnp.shape(ids_BT), -1)[..., columns]

    return largest(captured(params), k)


def largest(x_BTF: Any, k: int = 10) -> Examples:
    """Finds the top k values of each column: neurons, or features encoded by gptjax.interpret.sparse."""
    x_BTF = jnp.asarray(x_BTF)
    _, T, F = x_BTF.shape
    values, indices = (np.asarray(x) for x in jax.lax.top_k(x_BTF.reshape(-1, F).T, k))
    return Examples(values, indices // T, indices % T)
