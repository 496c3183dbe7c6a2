"""Norms of parameters and updates by group, computed on the device as metrics of the train step.

A group is a module of a block, such as "block_0/mlp", or a module outside the blocks, such as "tokens".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models.stacking import unstack

PREFIX = "statistics/"
NAMES = ("parameters", "updates", "ratio")  # two norms of a group, and the second divided by the first

Values = dict[str, jax.Array]


def step_statistics(before: Any, after: Any, step: jax.Array, every: int) -> Values:
    """Computes norms by "statistics/GROUP/NAME" at every `every`-th step; at the others they are 0 at no cost.

    Args:
      before: parameters before the update; layers may be stacked.
      after: parameters after the update.
      step: number of steps including this one.
      every: steps between measurements; 0: returns no statistics.
    """
    if not every:
        return {}

    def measured() -> Values:
        updates = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old.astype(jnp.float32), after, before)
        sizes, update_sizes = norms(before), norms(updates)
        by_group = {group: (size, update_sizes[group], update_sizes[group] / size) for group, size in sizes.items()}
        return {
            f"{PREFIX}{group}/{name}": value
            for group, values in by_group.items()
            for name, value in zip(NAMES, values, strict=True)
        }

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured))
    return jax.lax.cond(step % every == 0, measured, lambda: nothing)


def norms(tree: Any) -> Values:
    """Euclidean norm of each group."""
    squares: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(unstack(tree)):
        squares.setdefault(group_of([str(key.key) for key in path]), []).append(jnp.sum(leaf.astype(jnp.float32) ** 2))
    return {group: jnp.sqrt(sum(values, start=jnp.zeros(()))) for group, values in squares.items()}


def group_of(path: list[str]) -> str:
    """Group of a parameter: the path up to a module of a block, or outside the blocks the first name of the path."""
    block = next((number for number, name in enumerate(path) if name.startswith("block_")), None)
    return "/".join(path[: 1 if block is None else block + 2])


def select(values: Mapping[str, Any], step: int, every: int) -> dict[str, float]:
    """Selects the statistics among the metrics of a step; empty at steps without statistics."""
    if not every or step % every:
        return {}
    return {name: float(value) for name, value in values.items() if name.startswith(PREFIX)}
