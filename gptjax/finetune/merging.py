"""Merging of models of the same shape: means of parameters, and sums of task vectors on a shared base.

Pure functions of parameters. A task vector is the difference of a run's parameters and its base's.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp


def mean(models: Sequence[Any]) -> Any:
    """Returns the mean of models, such as of a run's last checkpoints (arXiv 2203.05482 section 2, uniform soup)."""
    return jax.tree.map(lambda *leaves: reduce(jnp.add, leaves) / len(leaves), *models)


def task_arithmetic(base: Any, models: Sequence[Any], scale: float = 1.0) -> Any:
    """Computes base + scale * the sum of the task vectors (arXiv 2212.04089 section 2)."""
    return jax.tree.map(lambda first, *leaves: first + scale * sum(leaf - first for leaf in leaves), base, *models)


def ties(base: Any, models: Sequence[Any], scale: float = 1.0, density: float = 0.2) -> Any:
    """Computes base + scale * the TIES merge of the task vectors (arXiv 2306.01708 section 4.2).

    Each vector is trimmed to its elements of the greatest magnitude. For each parameter the sign with the larger sum is
    elected, and the elements of that sign are averaged.

    Args:
      base: parameters that all models were tuned from.
      models: parameters of the same shapes.
      scale: factor of the merged vector.
      density: share of each vector's elements that is kept.
    """
    vectors = [trim(jax.tree.map(jnp.subtract, model, base), density) for model in models]

    def merged(first: jax.Array, *leaves: jax.Array) -> jax.Array:
        stacked = jnp.stack(leaves)
        agrees = jnp.sign(stacked) == jnp.sign(stacked.sum(0))
        counts = (agrees & (stacked != 0)).sum(0)
        return first + scale * jnp.where(agrees, stacked, 0).sum(0) / jnp.maximum(counts, 1)

    return jax.tree.map(merged, base, *vectors)


def trim(vector: Any, density: float) -> Any:
    """Sets all but that share of a vector's elements, those of the greatest magnitude, to 0."""
    magnitudes = jnp.sort(jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(vector)]))
    count = max(round(density * magnitudes.size), 1)
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= magnitudes[-count], leaf, 0), vector)


# (base, models, scale, density) -> parameters.
MERGE_METHODS: dict[str, Callable[[Any, Sequence[Any], float, float], Any]] = {
    "mean": lambda base, models, scale, density: mean(models),
    "arithmetic": lambda base, models, scale, density: task_arithmetic(base, models, scale),
    "ties": ties,
}
