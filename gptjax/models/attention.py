"""Attention: each position reads from itself and the positions before it. No cache and no mesh axis here."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import axes
from gptjax.models.kernels import KERNELS
from gptjax.models.kernels.plain import Causal
from gptjax.models.layers import Linear, RMSNorm, residual_std
from gptjax.models.positions import Places


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
        J = H // G
        qkv = Linear((H + 2 * G) * K, c.qkv_bias, c.init_std, self.dtype, c.kernels, name="qkv")(x_BTD)
        # Key head by key head: its J queries, its keys, its values; so that heads can be divided among devices.
        qkv = axes.constrain(qkv.reshape(B, T, G, J + 2, K), "BTG__")
        q, k, v = qkv[..., :J, :].reshape(B, T, H, K), qkv[..., J, :], qkv[..., J + 1, :]
        if c.qk_norm:  # arXiv 2010.04245, per head and with a scale as in Qwen3
            q = RMSNorm(False, c.norm_epsilon, c.kernels, name="q_norm")(q)
            k = RMSNorm(False, c.norm_epsilon, c.kernels, name="k_norm")(k)
        if places.rotation:
            q, k = places.rotation.turn(q), places.rotation.turn(k)
        if first_v_BTGK is not None:  # arXiv 2410.17897 eq. 7, the two shares adding up to one
            first_v_BTGK = jnp.where(first_layer, v, first_v_BTGK)
            share = axes.parameter(self, "first_value_share", nn.initializers.constant(0.5), ())
            v = ((1 - share) * v + share * first_v_BTGK).astype(v.dtype)
        drop = nn.Dropout(c.dropout, deterministic=False) if c.dropout and not deterministic else None
        q, k, v = axes.constrain(q, "BTHK"), axes.constrain(k, "BSGK"), axes.constrain(v, "BSGK")
        causal = Causal(window, c.attention_scale, places.slopes_H, drop, places.segments_BT)
        mixed_BTHK = KERNELS[c.kernels].attend(q, k, v, causal)
        out = Linear(D, c.use_bias, residual_std(c), self.dtype, c.kernels, name="out")
        mixed = axes.constrain(mixed_BTHK.reshape(B, T, H * K), "BTH")
        return axes.constrain(out(mixed), "BTD"), first_v_BTGK
