"""Diagonal of the empirical Fisher information of a model's parameters."""

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
    """Computes the mean over rows of the squared gradient of each row's loss (arXiv 1905.12558 eq. 3), without dropout.

    A row's loss is the objective's sum over its tokens by the given weights, not a mean: for a decoder it is
    -log p(row), so that the gradient of the whole row's log-likelihood is squared, with targets from the data.

    Args:
      objective: see gptjax.objectives.
      params: parameters to differentiate by, float32.
      batches: arrays [B, ...]; every device reads every row.
      frozen: the model's other parameters.
      compiler_options: XLA options by name.
      advance: called after each batch with its number of rows.

    Returns:
      A tree like `params`, in nats^2 per squared unit of the parameter; each leaf has the sharding of its parameter.

    Raises:
      ValueError: there are no rows.
    """
    frozen = frozen or {}
    params = jax.tree.map(jnp.asarray, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def row_gradient(params: Any, frozen: Any, row: Any) -> Any:
        return jax.grad(lambda params: objective(paths.union(frozen, params), row, None)[0])(params)

    def add(total: Any, params: Any, frozen: Any, batch: Any) -> Any:
        def add_row(total: Any, row: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda sum, g: sum + g**2, total, row_gradient(params, frozen, row)), None

        return jax.lax.scan(add_row, total, jax.tree.map(lambda x: x[:, None], batch))[0]

    accumulate = jax.jit(
        add, donate_argnums=0, out_shardings=shardings, compiler_options=dict(compiler_options or {}) or None
    )
    total, count = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=shardings)(params), 0
    for batch in batches:
        rows = len(jax.tree.leaves(batch)[0])
        total, count = jax.block_until_ready(accumulate(total, params, frozen, batch)), count + rows
        advance(rows)
    if not count:
        raise ValueError("there are no rows to estimate on")
    return jax.tree.map(lambda sum: sum / count, total)
