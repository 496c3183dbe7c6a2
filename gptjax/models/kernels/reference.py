"""Reference implementations: short formulas, differentiated by JAX, which all other kernels are tested against."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models import logical_axes

Elementwise = Callable[..., jax.Array]


class Relative(NamedTuple):
    """Relative position biases by buckets of distances (arXiv 1910.10683 section 2.1)."""

    table_RH: jax.Array  # bias by bucket and head
    longest: int  # distances from here on share the last bucket


class Prefix(NamedTuple):
    """Keys and values that every query attends to, at any position."""

    k_PGK: jax.Array
    v_PGK: jax.Array


class AttentionSpec(NamedTuple):
    """Parameters of self-attention besides queries, keys and values."""

    window: int | jax.Array = 0  # the number of keys that a query attends to, its own included; 0: all
    scale: float | None = None  # of query-key products; None: 1 / sqrt(K)
    slopes_H: jax.Array | None = None  # ALiBi: slope * distance is subtracted from scores (arXiv 2108.12409)
    drop: Callable[[jax.Array], jax.Array] | None = None  # applied to the attention weights, e.g. a dropout
    segments_BT: jax.Array | None = None  # queries attend within their segment; None: a row is one segment
    causal: bool = True  # queries attend only to keys at their own and earlier positions
    bidirectional_BT: jax.Array | None = None  # 1: keys that earlier queries attend to as well
    relative: Relative | None = None
    prefix: Prefix | None = None

    @property
    def needs_reference(self) -> bool:
        """Returns True if only the reference implementation supports this spec."""
        return not (self.causal and self.bidirectional_BT is None and self.relative is None and self.prefix is None)


def product(x: jax.Array, kernel_DF: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """x @ kernel over the last axis of x, with operands in `dtype` and accumulation in `out_dtype`: [..., F]."""
    return jnp.dot(x.astype(dtype), kernel_DF.astype(dtype), preferred_element_type=out_dtype)


def ragged_product(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies each row by its expert's kernel, [M, F]; rows are sorted by expert, sizes_E rows for each."""
    return jax.lax.ragged_dot(x_MD, kernel_EDF, sizes_E)


def dot(x: jax.Array, y: jax.Array, transpose_x: bool = False, transpose_y: bool = False) -> jax.Array:
    """x @ y of two matrices, either transposed first, with float32 accumulation."""
    return jnp.dot(x.T if transpose_x else x, y.T if transpose_y else y, preferred_element_type=jnp.float32)


def normalize(x: jax.Array, scale_D: jax.Array, epsilon: float, center: bool) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale over the last axis; without `center` the mean is taken as 0."""
    centered = x - x.mean(-1, keepdims=True) if center else x
    return centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + epsilon) * scale_D


def activate(f: Elementwise) -> Elementwise:
    """Returns the elementwise function unchanged."""
    return f


def static_windows(config: Any) -> bool:
    """Returns True if each layer's window is static: not if scanned layers have different windows."""
    return not config.scan_layers or len(set(config.windows)) == 1


def visible(queries_T: jax.Array, keys_S: jax.Array, window: int | jax.Array, causal: bool = True) -> jax.Array:
    """mask_TS: True where a query may attend to a key.

    Args:
      queries_T, keys_S: positions.
      window: the maximum number of keys that a query attends to, its own included; 0 for all.
      causal: True masks keys after the query; otherwise the window extends both ways.
    """
    distance_TS = queries_T[:, None] - keys_S
    near_TS = (jnp.abs(distance_TS) < window) | (jnp.asarray(window) == 0)
    return (distance_TS >= 0) & near_TS if causal else near_TS


def relative_position_bucket(distance: jax.Array, buckets: int, longest: int, causal: bool) -> jax.Array:
    """The bucket of a distance, query position minus key position (arXiv 1910.10683 section 2.1).

    Half of the buckets hold one distance each; the others grow geometrically up to `longest`. Without a causal mask,
    the second half of all buckets is for keys after the query.
    """
    after = jnp.zeros_like(distance)
    if not causal:
        buckets //= 2
        after, distance = buckets * (distance < 0), jnp.abs(distance)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    logs = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(longest / exact)
    geometric = jnp.minimum(exact + (logs * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return after + jnp.where(distance < exact, distance, geometric)


def score_bias(spec: AttentionSpec, distance_TS: jax.Array) -> jax.Array | None:
    """Bias of attention scores by distance, query position minus key position: [..., H, T, S], or None."""
    if spec.slopes_H is not None:
        return -spec.slopes_H[:, None, None] * jnp.abs(distance_TS)[..., None, :, :]
    if spec.relative is not None:
        table_RH = spec.relative.table_RH
        bucket_TS = relative_position_bucket(distance_TS, table_RH.shape[0], spec.relative.longest, spec.causal)
        return jnp.moveaxis(table_RH[bucket_TS], -1, -3)
    return None


def prepend_prefix(
    prefix: Prefix | None, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Prepends a prefix to keys, values, mask and bias of `masked_attend`; every query attends to it without bias."""
    if prefix is None:
        return k_BSGK, v_BSGK, mask, bias
    B, P = k_BSGK.shape[0], prefix.k_PGK.shape[0]

    def prepend(prefix_PGK: jax.Array, x_BSGK: jax.Array) -> jax.Array:
        prefix_BPGK = jnp.broadcast_to(prefix_PGK.astype(x_BSGK.dtype), (B, *prefix_PGK.shape))
        return jnp.concatenate([prefix_BPGK, x_BSGK], axis=1)

    def pad(x: jax.Array, value: Any) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(P, 0)], constant_values=value)

    bias = None if bias is None else pad(bias, 0)
    return prepend(prefix.k_PGK, k_BSGK), prepend(prefix.v_PGK, v_BSGK), pad(mask, True), bias


def segment_mask(queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """mask_BTS: True where query and key have the same segment."""
    return queries_BT[:, :, None] == keys_BS[:, None, :]


def masked_attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    bias_HTS: jax.Array | None = None,
    drop: Any = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v for grouped heads (arXiv 1706.03762 eq. 1, arXiv 2305.13245) -> [B, T, H, K].

    Args:
      q_BTHK, k_BSGK, v_BSGK: queries, keys and values; G divides H, and H/G query heads share a key head.
      mask: True where query t may attend to key s, [T, S] or any shape that broadcasts to [B, H, T, S].
      scale: of the products; None for 1 / sqrt(K).
      bias_HTS: added to the scores, float32, with a leading B if rows differ; None for no bias.
      drop: applied to the attention weights, e.g. dropout; None for no dropout.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGJK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgjk,bsgk->bgjts", q_BTGJK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1) * (1 / math.sqrt(K) if scale is None else scale)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS
    scores_BHTS = jnp.where(mask, scores_BHTS, -jnp.inf)
    # Normalizing after the value product divides K columns instead of S.
    weights = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True)))
    sums_BHT1 = weights.sum(-1, keepdims=True)
    if drop is not None:
        weights = drop(weights)
    weights = weights.astype(v_BSGK.dtype).reshape(B, G, H // G, T, -1)
    mixed_BTHK = jnp.einsum("bgjts,bsgk->btgjk", weights, v_BSGK).reshape(B, T, H, -1)
    return mixed_BTHK / sums_BHT1.transpose(0, 2, 1, 3).astype(mixed_BTHK.dtype)


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Self-attention -> [B, T, H, K]; see `masked_attend`."""
    # Each query attends to all keys: devices that shard sequences gather them (arXiv 2407.21783 section 3.3.2).
    k_BTGK, v_BTGK = logical_axes.constrain(k_BTGK, "BSGK"), logical_axes.constrain(v_BTGK, "BSGK")
    positions_T = jnp.arange(q_BTHK.shape[1])
    mask = visible(positions_T, positions_T, spec.window, spec.causal)
    if spec.bidirectional_BT is not None:
        mask = mask | (spec.bidirectional_BT > 0)[:, None, None]
    if spec.segments_BT is not None:
        mask = mask & segment_mask(spec.segments_BT, spec.segments_BT)[:, None]
    bias_HTS = score_bias(spec, positions_T[:, None] - positions_T)
    k, v, mask, bias_HTS = prepend_prefix(spec.prefix, k_BTGK, v_BTGK, mask, bias_HTS)
    return masked_attend(q_BTHK, k, v, mask, spec.scale, bias_HTS, spec.drop)


def cross_attend(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, scale: float | None, drop: Any
) -> jax.Array:
    """Cross-attention -> [B, T, H, K]; see `masked_attend`."""
    return masked_attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS[:, None], scale, None, drop)


def cross_attention_weights(
    q_BTHK: jax.Array, k_BSGK: jax.Array, mask_BTS: jax.Array, scale: float | None
) -> jax.Array:
    """Attention weights of `cross_attend`, float32 [B, H, T, S]."""
    S = k_BSGK.shape[1]
    one_hot_BSGS = jnp.broadcast_to(jnp.eye(S)[None, :, None], (*k_BSGK.shape[:3], S))
    return masked_attend(q_BTHK, k_BSGK, one_hot_BSGS, mask_BTS[:, None], scale).swapaxes(1, 2)


def self_attention_weights(q_BTHK: jax.Array, k_BTGK: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Attention weights of `attend` without dropout, float32 [B, H, T, T].

    Weights of a prefix are left out, so that rows then sum to less than one.
    """
    B, T, G, _ = k_BTGK.shape
    one_hot_BTGT = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, G, T))
    if spec.prefix is not None:
        k_PGK = spec.prefix.k_PGK
        spec = spec._replace(prefix=Prefix(k_PGK, jnp.zeros((*k_PGK.shape[:2], T))))
    return attend(q_BTHK, k_BTGK, one_hot_BTGT, spec._replace(drop=None)).swapaxes(1, 2)


def pair_mask(segments_BT: jax.Array | None, segments_BS: jax.Array) -> jax.Array:
    """mask_BTS of target tokens that attend to source tokens of their segment; None: of segment 1.

    A token whose segment the source lacks, such as padding, attends to everything, so that the result is finite.
    """
    segments_BT = jnp.ones((segments_BS.shape[0], 1), segments_BS.dtype) if segments_BT is None else segments_BT
    mask_BTS = segment_mask(segments_BT, segments_BS)
    return mask_BTS | ~mask_BTS.any(-1, keepdims=True)


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """Describes in one line what computes attention."""
    return "plain"


def compiler_options(dtype: str) -> dict[str, str]:
    """Returns no compiler options."""
    return {}


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap) (arXiv 2408.00118 section 2); the logits themselves where cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def unembed(x: jax.Array, unembedding_VD: jax.Array, cap: float) -> jax.Array:
    """Computes softcapped float32 logits: [..., D] -> [..., V]."""
    with jax.named_scope("head"):
        logits = jnp.dot(x, unembedding_VD.T.astype(x.dtype), preferred_element_type=jnp.float32)
    return softcap(logits, cap)


class TokenLoss(NamedTuple):
    """Weighted sums over positions. Only the loss has a gradient."""

    loss: jax.Array  # the training loss
    nats: jax.Array  # -log softmax(logits)[target]
    hits: jax.Array  # 1 where no token is more likely than the target


def token_loss(
    x_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Cross-entropy with label smoothing and z-loss, in nats.

    Args:
      x_BTD: hidden states that the unembedding multiplies.
      unembedding_VD: a row per token; the product is in x's dtype with float32 accumulation.
      targets_BT: token ids.
      weights_BT: weight of each position, float32.
      cap: softcap of the logits; 0 for none.
      smoothing: probability mass spread evenly over all tokens (label smoothing, arXiv 1512.00567 section 7).
      z_loss: factor of log(sum(exp(logits)))^2, which keeps logits from drifting (arXiv 2204.02311 section 5).
    """
    logits_BTV = unembed(x_BTD, unembedding_VD, cap)
    # A masked sum instead of indexing, so that the vocabulary can be sharded.
    target_logit_BT = jnp.sum(logits_BTV, axis=-1, where=jnp.arange(unembedding_VD.shape[0]) == targets_BT[..., None])
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nats_BT = log_sum_BT - target_logit_BT
    hits_BT = (target_logit_BT >= logits_BTV.max(-1)).astype(jnp.float32)
    loss_BT = nats_BT
    if smoothing:
        loss_BT += smoothing * (target_logit_BT - logits_BTV.mean(-1))
    if z_loss:
        loss_BT += z_loss * log_sum_BT**2
    nats, hits = (jax.lax.stop_gradient(jnp.sum(x_BT * weights_BT)) for x_BT in (nats_BT, hits_BT))
    return TokenLoss(jnp.sum(loss_BT * weights_BT), nats, hits)


def cross_entropy(
    x_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, cap: float
) -> jax.Array:
    """Sum over positions of weight * -log softmax(logits)[target], in nats; arguments are those of `token_loss`."""
    return token_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, cap).loss
