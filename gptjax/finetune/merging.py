"""Several models of one shape as one: means of their parameters, and what they learnt added to the base they share.

Pure functions of parameters; a task's vector is what a run's parameters differ by from its base's.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp


def mean(models: Sequence[Any]) -> Any:
    """Their mean, such as of a run's last checkpoints (arXiv 2203.05482 section 2, all of them)."""
    return jax.tree.map(lambda *leaves: reduce(jnp.add, leaves) / len(leaves), *models)


def task_arithmetic(base: Any, models: Sequence[Any], scale: float = 1.0) -> Any:
    """base + scale * the sum of the tasks' vectors (arXiv 2212.04089 section 2)."""
    return jax.tree.map(lambda first, *leaves: first + scale * sum(leaf - first for leaf in leaves), base, *models)


def ties(base: Any, models: Sequence[Any], scale: float = 1.0, kept: float = 0.2) -> Any:
    """base + scale * the tasks' vectors as TIES merges them (arXiv 2306.01708 section 4.2).

    Of each vector all but the largest numbers are left out; for each parameter the sign with the larger sum is elected,
    and those that have it are averaged.

    Args:
      base: that all began from.
      models: of its shape.
      scale: of what is added.
      kept: share of each vector's numbers that count, those of the greatest magnitude.
    """
    vectors = [trim(jax.tree.map(jnp.subtract, model, base), kept) for model in models]

    def merged(first: jax.Array, *leaves: jax.Array) -> jax.Array:
        stacked = jnp.stack(leaves)
        agrees = jnp.sign(stacked) == jnp.sign(stacked.sum(0))
        counts = (agrees & (stacked != 0)).sum(0)
        return first + scale * jnp.where(agrees, stacked, 0).sum(0) / jnp.maximum(counts, 1)

    return jax.tree.map(merged, base, *vectors)


def trim(vector: Any, kept: float) -> Any:
    """The vector with all but that share of its numbers, those of the greatest magnitude, set to 0."""
    sizes = jnp.sort(jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(vector)]))
    count = max(round(kept * sizes.size), 1)
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= sizes[-count], leaf, 0), vector)


# (base, models, scale, kept) -> parameters.
MERGE_METHODS: dict[str, Callable[[Any, Sequence[Any], float, float], Any]] = {
    "mean": lambda base, models, scale, kept: mean(models),
    "arithmetic": lambda base, models, scale, kept: task_arithmetic(base, models, scale),
    "ties": ties,
}
