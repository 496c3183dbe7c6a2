"""How much a model's answers depend on each of its parameters: the diagonal of the empirical Fisher information."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.finetune import paths
from gptjax.objectives.objective import Loss


def diagonal(
    objective: Loss,
    params: Mapping[str, Any],
    batches: Iterable[Any],
    frozen: Mapping[str, Any] | None = None,
    compiler_options: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Any:
    """The mean over rows of the squared gradient of each row's loss (arXiv 1905.12558 eq. 3), no dropout drawn.

    A row's loss is the objective's sum over its tokens by weights as they are given, not their mean: of a decoder
    -log p(row), so that what is squared is the gradient of a whole row's log-likelihood, targets as in the data.

    Args:
      objective: see gptjax.objectives.
      params: those that it is wanted of, float32.
      batches: arrays [B, ...] each; every device reads every row.
      frozen: the model's other parameters.
      compiler_options: told to XLA, by name.
      advance: called after each batch with its rows.

    Returns:
      a tree as `params`, in nats^2 per squared unit of the parameter; each leaf lies where its parameter does.

    Raises:
      ValueError: there are no rows.
    """
    frozen = frozen or {}
    params = jax.tree.map(jnp.asarray, params)
    there = jax.tree.map(lambda leaf: leaf.sharding, params)

    def of_row(params: Any, frozen: Any, row: Any) -> Any:
        return jax.grad(lambda own: objective(paths.union(frozen, own), row, None)[0])(params)

    def add(total: Any, params: Any, frozen: Any, batch: Any) -> Any:
        def add_row(total: Any, row: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda sum, g: sum + g**2, total, of_row(params, frozen, row)), None

        return jax.lax.scan(add_row, total, jax.tree.map(lambda x: x[:, None], batch))[0]

    summed = jax.jit(add, donate_argnums=0, out_shardings=there, compiler_options=dict(compiler_options or {}) or None)
    total, count = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=there)(params), 0
    for batch in batches:
        rows = len(jax.tree.leaves(batch)[0])
        total, count = jax.block_until_ready(summed(total, params, frozen, batch)), count + rows
        advance(rows)
    if not count:
        raise ValueError("there are no rows to estimate on")
    return jax.tree.map(lambda sum: sum / count, total)
