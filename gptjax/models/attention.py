"""Attention: each position reads from its own sequence, or from another one. No mesh axis here."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import cache, logical_axes
from gptjax.models.cache import LayerCache
from gptjax.models.kernels import KERNELS, reference
from gptjax.models.kernels.reference import AttentionSpec, Relative
from gptjax.models.layers import Dropout, Linear, RMSNorm, is_off, residual_std
from gptjax.models.positions import PositionInfo


class CrossKV(NamedTuple):
    """What an encoder made of a source; or, for a layer that reads it, its keys and values."""

    x_BSM: Any  # [B, S, M], or a LayerCache
    segments_BS: jax.Array  # which pair each token is of, int32; 0 for padding


class Attention(nn.Module):
    """Attention with fused projections: of a sequence to itself, or to the tokens of a `Memory`.

    Attributes:
      config: `config.model`; reads heads, kv_heads, head_width, biases, qk_norm, attention_scale, value_residual.
      dtype: of the arithmetic.
      causal: whether a token reads only itself and those before it.
      crosses: whether it reads a memory, by `across`.
    """

    config: Any
    dtype: str
    causal: bool = True
    crosses: bool = False

    def setup(self) -> None:
        """Declares the projections."""
        c = self.config
        H, G, K = c.heads, c.kv_heads, c.head_width
        into = partial(Linear, use_bias=c.qkv_bias, init_std=c.init_std, dtype=self.dtype, kernels=c.kernels)
        if self.crosses:
            self.q, self.kv = into(H * K), into(2 * G * K)
        else:
            self.qkv = into((H + 2 * G) * K)
        if c.qk_norm:  # arXiv 2010.04245, per head and with a scale as in Qwen3
            self.q_norm, self.k_norm = (RMSNorm(False, c.norm_epsilon, c.kernels) for _ in range(2))
        if c.value_residual and not self.crosses:
            self.first_value_share = logical_axes.parameter(
                self, "first_value_share", nn.initializers.constant(0.5), ()
            )
        self.drop = Dropout(c.dropout)
        self.out = Linear(c.width, c.use_bias, residual_std(c), self.dtype, c.kernels)

    def __call__(
        self,
        x_BTD: jax.Array,
        position_info: PositionInfo,
        window: int | jax.Array,
        first_layer: bool | jax.Array,
        first_v_BTGK: jax.Array | None,
        deterministic: bool,
        kept: LayerCache | None = None,
    ) -> tuple[jax.Array, jax.Array | None, LayerCache | None]:
        """What each position read, [B, T, D]; the first layer's values, to be handed to the next layer; the cache.

        Args:
          x_BTD: the normalised residual stream.
          places: where its tokens stand.
          window: how far a token looks back, itself included; 0 for all the way.
          first_layer: whether this is it.
          first_v_BTGK: the first layer's values, where `config.value_residual` mixes them in; else None.
          deterministic: False drops out.
          kept: keys and values of the tokens before, if any are kept; these are added.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        H, G, K = c.heads, c.kv_heads, c.head_width
        J = H // G
        # Key head by key head: its J queries, its keys, its values; so that heads can be divided among devices.
        qkv = logical_axes.constrain(self.qkv(x_BTD).reshape(B, T, G, J + 2, K), "BTG__")
        q, k, v = qkv[..., :J, :].reshape(B, T, H, K), qkv[..., J, :], qkv[..., J + 1, :]
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_info.rotation:
            q, k = position_info.rotation.turn(q), position_info.rotation.turn(k)
        if first_v_BTGK is not None:  # arXiv 2410.17897 eq. 7, the two shares adding up to one
            first_v_BTGK = jnp.where(first_layer, v, first_v_BTGK)
            share = self.first_value_share
            v = ((1 - share) * v + share * first_v_BTGK).astype(v.dtype)
        q, k, v = (
            logical_axes.constrain(q, "BTHK"),
            logical_axes.constrain(k, "BTGK"),
            logical_axes.constrain(v, "BTGK"),
        )
        spec = self.spec(position_info, window, deterministic)
        if kept is None and self.is_mutable_collection("attention"):  # for pictures
            self.sow("attention", "weights_BHTT", reference.self_weights(q, k, spec))
        if kept is None:
            mixed_BTHK = KERNELS[c.kernels].attend(q, k, v, spec)
        else:
            kept = cache.written(kept, k, v, position_info.positions, position_info.count_B)
            mixed_BTHK = cache.attend(q, kept, position_info.positions, position_info.count_B, spec)
        return self._written(mixed_BTHK), first_v_BTGK, kept

    def spec(self, position_info: PositionInfo, window: int | jax.Array, deterministic: bool) -> AttentionSpec:
        """What a sequence's attention to itself depends on; arguments as of the call."""
        c = self.config
        relative = (
            None if position_info.relative_RH is None else Relative(position_info.relative_RH, c.relative.longest)
        )
        drop = self._drop(deterministic)
        return AttentionSpec(
            window,
            c.attention_scale,
            position_info.slopes_H,
            drop,
            position_info.segments_BT,
            self.causal,
            position_info.bidirectional_BT,
            relative,
        )

    def across(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, memory: CrossKV, deterministic: bool
    ) -> jax.Array:
        """What each position read of a memory, [B, T, D].

        Args:
          x_BTD: the normalised residual stream.
          segments_BT: which pair each token is of; None: of the first.
          memory: of the encoder, or of this layer as `remembered` gives it; where it has fewer rows, as many rows of x
            after one another read each of them.
          deterministic: False drops out.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        sources = memory.segments_BS.shape[0]
        q_BTHK = self.q(x_BTD).reshape(sources, B // sources * T, c.heads, c.head_width)
        if c.qk_norm:
            q_BTHK = self.q_norm(q_BTHK)
        k_BGSK, v_BGSK = memory.x_BSM if isinstance(memory.x_BSM, LayerCache) else self.remembered(memory).x_BSM
        k_BSGK, v_BSGK = (x.swapaxes(1, 2).astype(q_BTHK.dtype) for x in (k_BGSK, v_BGSK))
        mask_BTS = reference.pair_mask(segments_BT, memory.segments_BS)
        if self.is_mutable_collection("attention"):  # for pictures
            weights = reference.attention_weights(q_BTHK, k_BSGK, mask_BTS, c.attention_scale)
            self.sow("attention", "weights_BHTS", weights)
        drop = self._drop(deterministic)
        mixed = reference.across(q_BTHK, k_BSGK, v_BSGK, mask_BTS, c.attention_scale, drop)
        return self._written(mixed.reshape(B, T, c.heads, c.head_width))

    def remembered(self, memory: CrossKV) -> CrossKV:
        """The memory as this layer reads it: keys and values, made once."""
        c = self.config
        B, S, _ = memory.x_BSM.shape
        kv = logical_axes.constrain(self.kv(memory.x_BSM).reshape(B, S, c.kv_heads, 2, c.head_width), "BSG__")
        k_BSGK, v_BSGK = kv[..., 0, :], kv[..., 1, :]
        if c.qk_norm:
            k_BSGK = self.k_norm(k_BSGK)
        return CrossKV(LayerCache(k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)), memory.segments_BS)

    def _drop(self, deterministic: bool) -> Any:
        return partial(self.drop, deterministic=False) if not (deterministic or is_off(self.config.dropout)) else None

    def _written(self, mixed_BTHK: jax.Array) -> jax.Array:
        B, T, H, K = mixed_BTHK.shape
        mixed = logical_axes.constrain(mixed_BTHK.reshape(B, T, H * K), "BTH")
        return logical_axes.constrain(self.out(mixed), "BTD")
