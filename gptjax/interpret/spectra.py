"""Analysis of parameters: spectra of matrices, and nearest neighbors of token embeddings. Runs no model."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models.stacking import unstack


def matrices(params: Any, where: str = ".*/kernel") -> dict[str, np.ndarray]:
    """Parameters with two axes or more whose path matches a regular expression, by path, with layers unstacked."""
    leaves = jax.tree_util.tree_leaves_with_path(unstack(params))
    by_path = [(jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in leaves]
    return {name: leaf for name, leaf in by_path if leaf.ndim >= 2 and re.fullmatch(where, name)}


def singular_values(params: Any, where: str = ".*/kernel") -> dict[str, np.ndarray]:
    """Singular values by path, the largest first; for stacked matrices [..., D, F] those of each."""
    return {
        name: np.linalg.svd(leaf.astype(np.float64), compute_uv=False) for name, leaf in matrices(params, where).items()
    }


def normalize_rms(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divides each array by its root mean square, for comparison of distributions; no array may be all zero."""
    return {name: x / np.sqrt(np.mean(np.square(x))) for name, x in arrays.items()}


def effective_rank(singular: np.ndarray) -> np.ndarray:
    """Effective rank: exp of the entropy of the normalized singular values (Roy and Vetterli 2007)."""
    share = singular / singular.sum(-1, keepdims=True)
    return np.asarray(np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(-1)))


def neighbors(table_VD: Any, tokens: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest tokens of each token by cosine similarity, itself excluded.

    Args:
      table_VD: a row per token, such as `params["tokens"]["embedding"]`.
      tokens: ids, [N].
      k: number of neighbors, less than V.

    Returns:
      ids [N, k] and cosine similarities [N, k].
    """
    table = jnp.asarray(table_VD, jnp.float32)
    rows = table / jnp.maximum(jnp.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    ids_N = jnp.ravel(jnp.asarray(tokens))
    cosine_NV = jnp.where(jnp.arange(len(rows)) == ids_N[:, None], -jnp.inf, rows[ids_N] @ rows.T)
    best_Nk, neighbor_Nk = jax.lax.top_k(cosine_NV, k)
    return np.asarray(neighbor_Nk), np.asarray(best_Nk)
