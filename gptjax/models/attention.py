"""Self-attention and cross-attention. Names no mesh axis."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import cache, logical_axes
from gptjax.models.cache import LayerCache
from gptjax.models.kernels import KERNELS, reference
from gptjax.models.kernels.reference import AttentionSpec, Relative
from gptjax.models.layers import Dropout, Linear, RMSNorm, is_zero, residual_std
from gptjax.models.positions import PositionInfo


class NoNorm(nn.Module):
    """The identity, with the constructor of norms."""

    use_bias: bool = False
    epsilon: float = 0.0
    kernels: str = "plain"

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x."""
        return x


class JointRMSNorm(RMSNorm):
    """RMSNorm over the columns of all heads, [..., H, K], as in OLMo 2 (arXiv 2501.00656)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes each position."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


# Norms of queries and keys, [..., H, K] (arXiv 2010.04245).
QK_NORMS: dict[str, type[nn.Module]] = {
    "none": NoNorm,
    "head": RMSNorm,  # with one scale for all heads, as in Qwen 3
    "heads": JointRMSNorm,
}


class CrossKV(NamedTuple):
    """Output of an encoder, or the keys and values that a cross-attention layer projects it to."""

    x_BSM: Any  # [B, S, M], or a LayerCache
    segments_BS: jax.Array  # pair number of each token, int32; 0 for padding


class Attention(nn.Module):
    """Attention with fused projections: self-attention, or cross-attention to a `CrossKV`.

    Attributes:
      config: `config.model`; reads heads, kv_heads, head_width, biases, qk_norm, attention_scale, value_residual.
      dtype: of the arithmetic.
      causal: True if a token attends only to itself and earlier tokens.
      crosses: True for cross-attention, by `cross_attend`.
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
        qk_norm = QK_NORMS[c.qk_norm]
        self.q_norm, self.k_norm = (qk_norm(False, c.norm_epsilon, c.kernels) for _ in range(2))
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
        layer_cache: LayerCache | None = None,
    ) -> tuple[jax.Array, jax.Array | None, LayerCache | None]:
        """Computes self-attention.

        Args:
          x_BTD: the normalized residual stream.
          position_info: positions and segments of its tokens.
          window: the number of keys that a query attends to, its own included; 0 for all.
          first_layer: True in the first layer.
          first_v_BTGK: the first layer's values, which `config.value_residual` mixes in; else None.
          deterministic: False applies dropout.
          layer_cache: keys and values of earlier tokens, if they are cached; those of x_BTD are added.

        Returns:
          The output [B, T, D], the first layer's values for the next layer, and the updated cache.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        H, G, K = c.heads, c.kv_heads, c.head_width
        J = H // G
        # Grouped by key head (its J queries, its keys, its values), so that heads can be sharded.
        qkv = logical_axes.constrain(self.qkv(x_BTD).reshape(B, T, G, J + 2, K), "BTG__")
        q, k, v = qkv[..., :J, :].reshape(B, T, H, K), qkv[..., J, :], qkv[..., J + 1, :]
        q, k = self.q_norm(q), self.k_norm(k)
        if position_info.rotation:
            q, k = position_info.rotation.apply(q), position_info.rotation.apply(k)
        if first_v_BTGK is not None:  # arXiv 2410.17897 eq. 7, with coefficients that sum to one
            first_v_BTGK = jnp.where(first_layer, v, first_v_BTGK)
            share = self.first_value_share
            v = ((1 - share) * v + share * first_v_BTGK).astype(v.dtype)
        q, k, v = (
            logical_axes.constrain(q, "BTHK"),
            logical_axes.constrain(k, "BTGK"),
            logical_axes.constrain(v, "BTGK"),
        )
        spec = self.spec(position_info, window, deterministic)
        if layer_cache is None and self.is_mutable_collection("attention"):  # for gptjax.interpret
            self.sow("attention", "weights_BHTT", reference.self_attention_weights(q, k, spec))
        if layer_cache is None:
            mixed_BTHK = KERNELS[c.kernels].attend(q, k, v, spec)
        else:
            layer_cache = cache.write(layer_cache, k, v, position_info.positions, position_info.count_B)
            mixed_BTHK = cache.attend(q, layer_cache, position_info.positions, position_info.count_B, spec)
        return self._project_out(mixed_BTHK), first_v_BTGK, layer_cache

    def spec(self, position_info: PositionInfo, window: int | jax.Array, deterministic: bool) -> AttentionSpec:
        """The `AttentionSpec` of self-attention; arguments are those of `__call__`."""
        c = self.config
        relative = (
            None if position_info.relative_RH is None else Relative(position_info.relative_RH, c.relative.longest)
        )
        drop = self._dropout(deterministic)
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

    def cross_attend(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, memory: CrossKV, deterministic: bool
    ) -> jax.Array:
        """Computes cross-attention to a memory, [B, T, D].

        Args:
          x_BTD: the normalized residual stream.
          segments_BT: pair number of each token; None: pair 1.
          memory: the encoder output, or its projection by `project_memory`; if it has fewer rows than x_BTD, each of
            them serves equally many consecutive rows.
          deterministic: False applies dropout.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        sources = memory.segments_BS.shape[0]
        q_BTHK = self.q_norm(self.q(x_BTD).reshape(sources, B // sources * T, c.heads, c.head_width))
        k_BGSK, v_BGSK = memory.x_BSM if isinstance(memory.x_BSM, LayerCache) else self.project_memory(memory).x_BSM
        k_BSGK, v_BSGK = (x.swapaxes(1, 2).astype(q_BTHK.dtype) for x in (k_BGSK, v_BGSK))
        mask_BTS = reference.pair_mask(segments_BT, memory.segments_BS)
        if self.is_mutable_collection("attention"):  # for gptjax.interpret
            weights = reference.cross_attention_weights(q_BTHK, k_BSGK, mask_BTS, c.attention_scale)
            self.sow("attention", "weights_BHTS", weights)
        drop = self._dropout(deterministic)
        mixed = reference.cross_attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, c.attention_scale, drop)
        return self._project_out(mixed.reshape(B, T, c.heads, c.head_width))

    def project_memory(self, memory: CrossKV) -> CrossKV:
        """Projects a memory to the keys and values of this layer."""
        c = self.config
        B, S, _ = memory.x_BSM.shape
        kv = logical_axes.constrain(self.kv(memory.x_BSM).reshape(B, S, c.kv_heads, 2, c.head_width), "BSG__")
        k_BSGK, v_BSGK = self.k_norm(kv[..., 0, :]), kv[..., 1, :]
        return CrossKV(LayerCache(k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)), memory.segments_BS)

    def _dropout(self, deterministic: bool) -> Any:
        return partial(self.drop, deterministic=False) if not (deterministic or is_zero(self.config.dropout)) else None

    def _project_out(self, mixed_BTHK: jax.Array) -> jax.Array:
        B, T, H, K = mixed_BTHK.shape
        mixed = logical_axes.constrain(mixed_BTHK.reshape(B, T, H * K), "BTH")
        return logical_axes.constrain(self.out(mixed), "BTD")
