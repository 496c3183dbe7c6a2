"""The plain formulas: short, differentiated by JAX, and the reference that every other kernel is compared with."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Elementwise = Callable[..., jax.Array]


class Causal(NamedTuple):
    """What a token's attention to itself and to tokens before it depends on, besides queries, keys and values."""

    window: int | jax.Array = 0  # how many keys a query reads at most, its own included; 0: all up to its own
    scale: float | None = None  # of query-key products; None: 1 / sqrt(K)
    slopes_H: jax.Array | None = None  # scores are lowered by slope * distance (arXiv 2108.12409)
    drop: Callable[[jax.Array], jax.Array] | None = None  # applied to the attention weights, e.g. a dropout
    segments_BT: jax.Array | None = None  # a query reads keys of its own segment alone; None: a row is one segment


def product(x: jax.Array, kernel_DF: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """x @ kernel over the last axis of x, of operands in `dtype`, summed up to `out_dtype`: [..., F]."""
    return jnp.dot(x.astype(dtype), kernel_DF.astype(dtype), preferred_element_type=out_dtype)


def dot(x: jax.Array, y: jax.Array, turn_x: bool = False, turn_y: bool = False) -> jax.Array:
    """x @ y of two matrices, summed up in float32, either transposed first."""
    return jnp.dot(x.T if turn_x else x, y.T if turn_y else y, preferred_element_type=jnp.float32)


def standardise(x: jax.Array, scale_D: jax.Array, epsilon: float, centre: bool) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale over the last axis; without `centre` the mean is taken as 0."""
    centred = x - x.mean(-1, keepdims=True) if centre else x
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale_D


def activate(f: Elementwise) -> Elementwise:
    """The elementwise function itself."""
    return f


def windows_known(config: Any) -> bool:
    """Whether each layer's window is known before the program runs: not where one program serves several."""
    return not config.scan_layers or len(set(config.windows)) == 1


def visible(queries_T: jax.Array, keys_S: jax.Array, window: int | jax.Array) -> jax.Array:
    """mask_TS: True where the query at one position may read the key at another.

    Args:
      queries_T, keys_S: positions.
      window: how many keys a query reads at most, its own included; 0 for all up to its own.
    """
    distance_TS = queries_T[:, None] - keys_S
    return (distance_TS >= 0) & ((distance_TS < window) | (jnp.asarray(window) == 0))


def same_segment(queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """mask_BTS: True where query and key are of one segment."""
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
      mask: True where query t may read key s, [T, S] or of a shape that broadcasts to [B, H, T, S].
      scale: of the products; None for 1 / sqrt(K).
      bias_HTS: added to the scores, float32; None for nothing.
      drop: applied to the attention weights, e.g. a dropout; None for nothing.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGJK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgjk,bsgk->bgjts", q_BTGJK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1) * (1 / math.sqrt(K) if scale is None else scale)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS
    scores_BHTS = jnp.where(mask, scores_BHTS, -jnp.inf)
    # The division comes after the value product: K columns to divide instead of S.
    weights = jnp.exp(scores_BHTS - jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True)))
    sums_BHT1 = weights.sum(-1, keepdims=True)
    if drop is not None:
        weights = drop(weights)
    weights = weights.astype(v_BSGK.dtype).reshape(B, G, H // G, T, -1)
    mixed_BTHK = jnp.einsum("bgjts,bsgk->btgjk", weights, v_BSGK).reshape(B, T, H, K)
    return mixed_BTHK / sums_BHT1.transpose(0, 2, 1, 3).astype(mixed_BTHK.dtype)


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, causal: Causal) -> jax.Array:
    """Causal attention of a sequence to itself -> [B, T, H, K]; see `masked_attend`."""
    positions_T = jnp.arange(q_BTHK.shape[1])
    bias_HTS = None
    if causal.slopes_H is not None:
        bias_HTS = -causal.slopes_H[:, None, None] * (positions_T[:, None] - positions_T)
    mask = visible(positions_T, positions_T, causal.window)
    if causal.segments_BT is not None:
        mask = mask & same_segment(causal.segments_BT, causal.segments_BT)[:, None]
    return masked_attend(q_BTHK, k_BTGK, v_BTGK, mask, causal.scale, bias_HTS, causal.drop)


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """What computes attention."""
    return "plain"


def compiler_options(dtype: str) -> dict[str, str]:
    """Nothing that XLA does not do by itself."""
    return {}


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap) (arXiv 2408.00118 section 2); the logits themselves where cap is 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def unembed(x: jax.Array, table_VD: jax.Array, cap: float) -> jax.Array:
    """Logits of each row of the table, capped, in float32: [..., D] -> [..., V]."""
    with jax.named_scope("head"):
        logits = jnp.dot(x, table_VD.T.astype(x.dtype), preferred_element_type=jnp.float32)
    return softcap(logits, cap)


def cross_entropy(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, cap: float
) -> jax.Array:
    """Sum over positions of weight * -log softmax(logits)[target], in nats.

    Args:
      x_BTD: what the head reads.
      table_VD: a row per token; the product is in x's dtype, summed up in float32.
      targets_BT: token ids.
      weights_BT: how much each position counts, float32.
      cap: of the logits; 0 for none.
    """
    logits_BTV = unembed(x_BTD, table_VD, cap)
    # Not by an index: that way words can be divided among devices.
    chosen_BT = jnp.sum(logits_BTV, axis=-1, where=jnp.arange(table_VD.shape[0]) == targets_BT[..., None])
    return jnp.sum((jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT) * weights_BT)
