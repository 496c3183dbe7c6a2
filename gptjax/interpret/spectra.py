"""Parameters by themselves: spectra of matrices, and which tokens' vectors are near one another. Runs no model."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models.stacking import unstack


def matrices(params: Any, where: str = ".*/kernel") -> dict[str, np.ndarray]:
    """Parameters with two axes or more by path, of those whose whole path the expression matches, layers one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(unstack(params))
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in leaves]
    return {name: leaf for name, leaf in named if leaf.ndim >= 2 and re.fullmatch(where, name)}


def singular_values(params: Any, where: str = ".*/kernel") -> dict[str, np.ndarray]:
    """Singular values by path, the largest first; of experts' matrices [..., D, F] those of each."""
    return {
        name: np.linalg.svd(leaf.astype(np.float64), compute_uv=False) for name, leaf in matrices(params, where).items()
    }


def unit(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each divided by its root mean square, so that shapes can be seen beside one another; none may be all zero."""
    return {name: x / np.sqrt(np.mean(np.square(x))) for name, x in arrays.items()}


def effective_rank(singular: np.ndarray) -> np.ndarray:
    """exp of the entropy of singular values that are made to add up to one (Roy and Vetterli 2007)."""
    share = singular / singular.sum(-1, keepdims=True)
    return np.asarray(np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(-1)))


def neighbours(table_VD: Any, tokens: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The k tokens whose rows have the largest cosine with each token's, itself left out: ids [N, k], cosines [N, k].

    Args:
      table_VD: a row a token, such as `params["tokens"]["embedding"]`.
      tokens: ids, [N].
      k: how many, fewer than V.
    """
    table = jnp.asarray(table_VD, jnp.float32)
    rows = table / jnp.maximum(jnp.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    ids_N = jnp.ravel(jnp.asarray(tokens))
    cosine_NV = jnp.where(jnp.arange(len(rows)) == ids_N[:, None], -jnp.inf, rows[ids_N] @ rows.T)
    best_Nk, found_Nk = jax.lax.top_k(cosine_NV, k)
    return np.asarray(found_Nk), np.asarray(best_Nk)
