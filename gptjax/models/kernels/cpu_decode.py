"""Products of a few rows on CPU, as decoding has them: (W x^T)^T with W stored [out, in], so that it streams in order.

One row takes five sixths of x @ W's time, sixteen rows three quarters (experiments/bench). Nothing here has a gradient
of its own, and nothing here is faster for many rows.
"""

import jax
import jax.numpy as jnp

from gptjax.models.kernels.reference import softcap


def product(x: jax.Array, kernel_FD: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """As gptjax.models.kernels.reference.product, of a kernel that is stored the other way round: [..., F]."""
    y_FN = _dot(kernel_FD.astype(dtype), x.reshape(-1, x.shape[-1]).astype(dtype), out_dtype)
    return y_FN.T.reshape(*x.shape[:-1], -1)


def unembed(x: jax.Array, table_VD: jax.Array, cap: float) -> jax.Array:
    """As gptjax.models.kernels.reference.unembed."""
    with jax.named_scope("head"):
        logits_VN = _dot(table_VD.astype(x.dtype), x.reshape(-1, x.shape[-1]), "float32")
    return softcap(logits_VN.T.reshape(*x.shape[:-1], -1), cap)


def _dot(w_FD: jax.Array, x_ND: jax.Array, out_dtype: str) -> jax.Array:
    # Both transpositions are of small arrays; XLA would merge them into the product and take the slow one again.
    x_DN = jax.lax.optimization_barrier(x_ND.T)
    return jax.lax.optimization_barrier(jnp.dot(w_FD, x_DN, preferred_element_type=out_dtype))
