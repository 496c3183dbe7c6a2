"""Attention: each position reads from itself and the positions before it. No cache and no mesh axis here."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models.layers import Linear, RMSNorm, residual_std
from gptjax.models.positions import Places


def visible(queries_T: jax.Array, keys_S: jax.Array, window: int | jax.Array) -> jax.Array:
    """mask_TS: True where the query at one position may read the key at another.

    Args:
      queries_T, keys_S: positions.
      window: how many keys a query reads at most, its own included; 0 for all up to its own.
    """
    distance_TS = queries_T[:, None] - keys_S
    return (distance_TS >= 0) & ((distance_TS < window) | (jnp.asarray(window) == 0))


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_TS: jax.Array,
    scale: float | None = None,
    bias_HTS: jax.Array | None = None,
    drop: Any = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v for grouped heads (arXiv 1706.03762 eq. 1, arXiv 2305.13245) -> [B, T, H, K].

    Args:
      q_BTHK, k_BSGK, v_BSGK: queries, keys and values; G divides H, and H/G query heads share a key head.
      mask_TS: True where query t may read key s.
      scale: of the products; None for 1 / sqrt(K).
      bias_HTS: added to the scores, float32; None for nothing.
      drop: applied to the attention weights, e.g. a dropout; None for nothing.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BGTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * T, K)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bgtk,bgsk->bgts", q_BGTK, k_BGSK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1) * (1 / math.sqrt(K) if scale is None else scale)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS
    scores_BHTS = jnp.where(mask_TS, scores_BHTS, -jnp.inf)
    # The division comes after the value product: K columns to divide instead of S.
    weights = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True)))
    sums_BHT1 = weights.sum(-1, keepdims=True)
    if drop is not None:
        weights = drop(weights)
    weights = weights.astype(v_BSGK.dtype).reshape(B, G, H // G * T, -1)
    mixed = jnp.einsum("bgts,bgsk->bgtk", weights, v_BGSK).reshape(B, H, T, K)
    return (mixed / sums_BHT1.astype(mixed.dtype)).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Causal self-attention with fused projections to queries, keys and values.

    Attributes:
      config: `config.model`; reads heads, kv_heads, head_width, biases, qk_norm, attention_scale, value_residual.
      dtype: of the arithmetic.
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        window: int | jax.Array,
        first_layer: bool | jax.Array,
        first_v_BTGK: jax.Array | None,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What each position read, [B, T, D], and the first layer's values, to be handed to the next layer.

        Args:
          x_BTD: the normalised residual stream.
          places: where its tokens stand.
          window: how far a token looks back, itself included; 0 for all the way.
          first_layer: whether this is it.
          first_v_BTGK: the first layer's values, where `config.value_residual` mixes them in; else None.
          deterministic: False drops out.
        """
        c = self.config
        B, T, D = x_BTD.shape
        H, G, K = c.heads, c.kv_heads, c.head_width
        qkv = Linear((H + 2 * G) * K, c.qkv_bias, c.init_std, self.dtype, name="qkv")(x_BTD)
        q, k, v = jnp.split(qkv, [H * K, (H + G) * K], axis=-1)
        q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, K)
        if c.qk_norm:  # arXiv 2010.04245, per head and with a scale as in Qwen3
            q = RMSNorm(epsilon=c.norm_epsilon, name="q_norm")(q)
            k = RMSNorm(epsilon=c.norm_epsilon, name="k_norm")(k)
        if places.rotation:
            q, k = places.rotation.turn(q), places.rotation.turn(k)
        if first_v_BTGK is not None:  # arXiv 2410.17897 eq. 7, the two shares adding up to one
            first_v_BTGK = jnp.where(first_layer, v, first_v_BTGK)
            share = self.param("first_value_share", nn.initializers.constant(0.5), (), jnp.float32)
            v = ((1 - share) * v + share * first_v_BTGK).astype(v.dtype)
        bias_HTS = None
        if places.slopes_H is not None:
            distance_TS = places.positions_T[:, None] - places.positions_T
            bias_HTS = -places.slopes_H[:, None, None] * distance_TS
        mixed_BTHK = attend(
            q,
            k,
            v,
            mask_TS=visible(places.positions_T, places.positions_T, window),
            scale=c.attention_scale,
            bias_HTS=bias_HTS,
            drop=nn.Dropout(c.dropout, deterministic=deterministic) if c.dropout else None,
        )
        out = Linear(D, c.use_bias, residual_std(c), self.dtype, name="out")
        return out(mixed_BTHK.reshape(B, T, H * K)), first_v_BTGK
