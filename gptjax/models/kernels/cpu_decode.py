"""Matrix products of the few rows of decoding on CPU: (W x^T)^T with W stored [out, in], so that it streams in order.

One row takes five sixths of the time of x @ W, sixteen rows three quarters (experiments/bench). Not faster for many
rows, and without custom gradients.
"""

import jax
import jax.numpy as jnp

from gptjax.models.kernels.reference import softcap


def product(x: jax.Array, kernel_FD: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """Same as gptjax.models.kernels.reference.product, with a transposed kernel: [..., F]."""
    y_FN = _dot(kernel_FD.astype(dtype), x.reshape(-1, x.shape[-1]).astype(dtype), out_dtype)
    return y_FN.T.reshape(*x.shape[:-1], -1)


def unembed(x: jax.Array, unembedding_VD: jax.Array, cap: float) -> jax.Array:
    """Same as gptjax.models.kernels.reference.unembed."""
    with jax.named_scope("head"):
        logits_VN = _dot(unembedding_VD.astype(x.dtype), x.reshape(-1, x.shape[-1]), "float32")
    return softcap(logits_VN.T.reshape(*x.shape[:-1], -1), cap)


def _dot(w_FD: jax.Array, x_ND: jax.Array, out_dtype: str) -> jax.Array:
    # Both transposed arrays are small; XLA would fuse the transpositions into the product, which is slow again.
    x_DN = jax.lax.optimization_barrier(x_ND.T)
    return jax.lax.optimization_barrier(jnp.dot(w_FD, x_DN, preferred_element_type=out_dtype))
