"""How large parameters are and how far a step moves them, by group; computed on the device, and never waited for there.

A group is a part of a block, such as "block_0/mlp", or a folder beside the blocks, such as "tokens".
"""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models.stacking import unstack

PREFIX = "statistics/"
NAMES = ("parameters", "updates", "ratio")  # two norms, of all numbers of a group, and the second over the first

Values = dict[str, jax.Array]


def step_statistics(before: Any, after: Any, step: jax.Array, every: int) -> Values:
    """Norms by "statistics/GROUP/NAME", at every so manyth step; zeros at the others, at which nothing is computed.

    Args:
      before: parameters before the step's update; layers may be stacked.
      after: after it.
      step: how many steps have been taken with this one.
      every: steps between; 0: no step has any, and there are no names.
    """
    if not every:
        return {}

    def measured() -> Values:
        moved = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old.astype(jnp.float32), after, before)
        sizes, moves = norms(before), norms(moved)
        found = {group: (size, moves[group], moves[group] / size) for group, size in sizes.items()}
        return {
            f"{PREFIX}{group}/{name}": value
            for group, values in found.items()
            for name, value in zip(NAMES, values, strict=True)
        }

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measured))
    return jax.lax.cond(step % every == 0, measured, lambda: nothing)


def norms(tree: Any) -> Values:
    """The root of the sum of squares of each group."""
    squares: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(unstack(tree)):
        squares.setdefault(group_of([str(key.key) for key in path]), []).append(jnp.sum(leaf.astype(jnp.float32) ** 2))
    return {group: jnp.sqrt(sum(values, start=jnp.zeros(()))) for group, values in squares.items()}


def group_of(path: list[str]) -> str:
    """The part of a block, with all before it, that a parameter is in; of another parameter the first folder."""
    block = next((number for number, name in enumerate(path) if name.startswith("block_")), None)
    return "/".join(path[: 1 if block is None else block + 2])


def select(values: dict[str, Any], step: int, every: int) -> dict[str, float]:
    """Of a step's metrics the statistics, by name; none at a step that has none."""
    if not every or step % every:
        return {}
    return {name: float(value) for name, value in values.items() if name.startswith(PREFIX)}
