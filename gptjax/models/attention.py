"""Attention: each position reads from itself and the positions before it. No cache and no mesh axis here."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models.layers import Linear


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_TS: jax.Array, drop=None) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v for grouped heads (arXiv 1706.03762 eq. 1, arXiv 2305.13245) -> [B, T, H, K].

    Args:
      q_BTHK, k_BSGK, v_BSGK: queries, keys and values; G divides H, and H/G query heads share a key head.
      mask_TS: True where query t may read key s.
      drop: applied to the attention weights, e.g. a dropout; None for nothing.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * T, K)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgtk,bgsk->bgts", q_BGTK, k_BGSK, preferred_element_type=jnp.float32) / math.sqrt(K)
    scores_BHTS = jnp.where(mask_TS, scores.reshape(B, H, T, -1), -jnp.inf)
    # The division comes after the value product: K columns to divide instead of S.
    weights = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True)))
    sums_BHT1 = weights.sum(-1, keepdims=True)
    if drop is not None:
        weights = drop(weights)
    weights = weights.astype(v_BSGK.dtype).reshape(B, G, H // G * T, -1)
    mixed = jnp.einsum("bgts,bgsk->bgtk", weights, v_BGSK).reshape(B, H, T, K)
    return (mixed / sums_BHT1.astype(mixed.dtype)).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Causal self-attention: x_BTD -> [B, T, D], with fused projections to queries, keys and values."""

    heads: int
    kv_heads: int
    use_bias: bool
    dropout: float
    out_init_std: float
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
        B, T, D = x_BTD.shape
        H, G, K = self.heads, self.kv_heads, D // self.heads
        qkv = Linear((H + 2 * G) * K, self.use_bias, dtype=self.dtype, name="qkv")(x_BTD)
        q, k, v = jnp.split(qkv, [H * K, (H + G) * K], axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=deterministic) if self.dropout else None
        mixed_BTHK = attend(
            q.reshape(B, T, H, K),
            k.reshape(B, T, G, K),
            v.reshape(B, T, G, K),
            mask_TS=jnp.tri(T, dtype=bool),
            drop=drop,
        )
        return Linear(D, self.use_bias, self.out_init_std, self.dtype, name="out")(mixed_BTHK.reshape(B, T, D))
