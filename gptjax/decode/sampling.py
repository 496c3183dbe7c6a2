"""Logits to tokens. Pure functions on the device that know no model.

Filters take logits_BV float32 and one value per row, and set removed logits to -inf; each has a value that means "off".
Rows are independent: the result of a row is the same, bit for bit, alone and among others. Nothing sorts the
vocabulary: top-k, top-p and typical sampling each find where a sum of weights reaches a target (`cutoff`).
"""

import jax
import jax.numpy as jnp

from gptjax.decode import penalties
from gptjax.decode.penalties import History
from gptjax.decode.settings import SMALL_TOP_K, BatchedSamplingParams

LANES = 256  # over which the vocabulary is distributed for sums and sampling; a power of two


def process_logits(
    logits_BV: jax.Array,
    batched: BatchedSamplingParams,
    history: History,
    used: frozenset[str],
    ends: tuple[int, ...] = (),
) -> jax.Array:
    """Applies biases, penalties, temperature and filters to logits, in transformers' order.

    Args:
      logits_BV: the model's logits.
      batched: sampling parameters of each row.
      history: token ids of each row.
      used: static; kinds of processing that any row needs (gptjax.decode.settings.used).
      ends: static; ids that end a text.

    Returns:
      float32 [B, V], unnormalized logits. A row at temperature 0 has biases and penalties alone.
    """
    return apply_filters(apply_penalties(logits_BV.astype(jnp.float32), batched, history, used, ends), batched, used)


def apply_penalties(
    logits_BV: jax.Array, batched: BatchedSamplingParams, history: History, used: frozenset[str], ends: tuple[int, ...]
) -> jax.Array:
    """Applies biases, penalties and bans; arguments as for `process_logits`."""
    if "logit_bias" in used:
        logits_BV = penalties.apply_logit_bias(logits_BV, batched.bias_ids_Bn, batched.bias_Bn)
    if "repetition_penalty" in used:
        logits_BV = penalties.apply_repetition_penalty(logits_BV, history, batched.repetition_B)
    if "no_repeat_ngram" in used:
        logits_BV = penalties.ban_repeated_ngrams(logits_BV, history, batched.ngram_B)
    if "min_tokens" in used:
        logits_BV = penalties.apply_min_tokens(logits_BV, history, batched.min_tokens_B, ends)
    if "frequency_penalty" in used:
        logits_BV = penalties.apply_frequency_and_presence(logits_BV, history, batched.frequency_B, batched.presence_B)
    return logits_BV


def apply_filters(logits_BV: jax.Array, batched: BatchedSamplingParams, used: frozenset[str]) -> jax.Array:
    """Applies temperature and filters; arguments as for `process_logits`."""
    filtered_BV = logits_BV
    if "temperature" in used:
        filtered_BV = apply_temperature(filtered_BV, batched.temperature_B)
    if "top_many" in used:
        filtered_BV = top_k(filtered_BV, batched.top_k_B)
    elif "top_k" in used:
        filtered_BV = small_top_k(filtered_BV, batched.top_k_B)
    if "top_p" in used:
        filtered_BV = top_p(filtered_BV, batched.top_p_B)
    if "min_p" in used:
        filtered_BV = min_p(filtered_BV, batched.min_p_B)
    if "typical_p" in used:
        filtered_BV = typical(filtered_BV, batched.typical_p_B)
    if "greedy" in used and "sampling" in used:
        filtered_BV = jnp.where(batched.temperature_B[:, None] > 0, filtered_BV, logits_BV)
    return filtered_BV


def apply_temperature(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Divides logits by the temperature; 0: off."""
    return logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]


def small_top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Faster `top_k` for k of at most SMALL_TOP_K."""
    k = min(SMALL_TOP_K, logits_BV.shape[1])
    best_Bk = jax.lax.top_k(logits_BV, k)[0]
    kth_B1 = jnp.take_along_axis(best_Bk, jnp.clip(k_B - 1, 0, k - 1)[:, None], 1)
    return _mask(logits_BV, logits_BV < kth_B1, k_B > 0)


def top_k(logits_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Keeps the k largest logits and those equal to the k-th; 0: off."""
    last_B1 = cutoff(-logits_BV, jnp.ones_like(logits_BV), jnp.minimum(k_B, logits_BV.shape[1]))
    return _mask(logits_BV, -logits_BV > last_B1, k_B > 0)


def top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps the most likely ids whose probabilities reach p, and ties of the last (arXiv 1904.09751); 1: off.

    Of the ties, transformers keeps only as many as reach p; which ones depends on its sort.
    """
    weights_BV = _relative_probabilities(logits_BV)
    last_B1 = cutoff(-logits_BV, weights_BV, p_B * row_sum(weights_BV))
    return _mask(logits_BV, -logits_BV > last_B1, p_B < 1)


def min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps ids with at least p times the highest probability (arXiv 2407.01082); 0: off."""
    return _mask(logits_BV, _relative_probabilities(logits_BV) < p_B[:, None], p_B > 0)


def typical(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Keeps the ids of least |-log p(x) - H| whose probabilities reach p (arXiv 2202.00666, eq. 10); 1: off."""
    logprobs_BV = logits_BV - logsumexp(logits_BV)[:, None]
    probabilities_BV = jnp.exp(logprobs_BV)
    surprise_BV = jnp.where(probabilities_BV > 0, -logprobs_BV, 0)
    entropy_B = row_sum(probabilities_BV * surprise_BV)
    distance_BV = jnp.abs(-logprobs_BV - entropy_B[:, None])
    return _mask(logits_BV, distance_BV > cutoff(distance_BV, probabilities_BV, p_B), p_B < 1)


def _mask(logits_BV: jax.Array, removed_BV: jax.Array, on_B: jax.Array) -> jax.Array:
    return jnp.where(removed_BV & on_B[:, None], -jnp.inf, logits_BV)


def _relative_probabilities(logits_BV: jax.Array) -> jax.Array:
    """Probabilities divided by the highest one."""
    return jnp.exp(logits_BV - jnp.max(logits_BV, 1, keepdims=True))


def _laned_weights(logits_BV: jax.Array) -> jax.Array:
    """Relative probabilities in lanes; on CPU, lanes before the exponential take half the time of the other order."""
    return jnp.exp(_to_lanes(logits_BV, -jnp.inf) - jnp.max(logits_BV, 1)[:, None, None])


def cutoff(values_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """float32 [B, 1]: the least x for which the weights of values <= x sum to the target; NaN or inf where none does.

    An exact bisection over bits: floats are ordered as the integers with the same bits, but for the sign. 32 sums cost
    less than one sort (on two CPU cores, 16 rows of 50,257: 22 ms against 270).
    """
    ranks_Bnl = _to_lanes(_flip_negatives(jax.lax.bitcast_convert_type(values_BV, jnp.int32)), 0)
    weights_Bnl = _to_lanes(weights_BV, 0)

    def set_bit(n: jax.Array, x_B: jax.Array) -> jax.Array:
        candidate_B = x_B + jnp.left_shift(jnp.int32(1), 31 - n)  # the first time it wraps to 0
        below_B = _lane_sum(jnp.where(ranks_Bnl < candidate_B[:, None, None], weights_Bnl, 0))
        return jnp.where(below_B < target_B, candidate_B, x_B)

    least_B = jnp.full(len(values_BV), jnp.iinfo(jnp.int32).min)
    rank_B = jax.lax.fori_loop(0, 32, set_bit, least_B)
    return jax.lax.bitcast_convert_type(_flip_negatives(rank_B), jnp.float32)[:, None]


def _flip_negatives(bits: jax.Array) -> jax.Array:
    """Reverses the order of the bits of negative floats; its own inverse."""
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """int32 [B]: the id of the largest logit, the first of ties. (`argmax` takes three times as long on CPU.)"""
    V = logits_BV.shape[1]
    is_best_BV = logits_BV == jnp.max(logits_BV, 1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(is_best_BV, jnp.arange(V, dtype=jnp.int32), V), 1), V - 1)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature_B: jax.Array,
    used: frozenset[str] = frozenset({"greedy", "sampling"}),
) -> jax.Array:
    """Samples an id from softmax(logits) of each row; the most likely, the first of ties, at temperature 0.

    Args:
      logits_BV: from `process_logits`, temperature included.
      keys_B: a jax.random key for each row.
      temperature_B: only compared with 0.
      used: static; with "greedy", "sampling" or both.

    Returns:
      int32 [B].
    """
    if "sampling" not in used:
        return greedy(logits_BV)
    sampled_B = _categorical(logits_BV, keys_B)
    return jnp.where(temperature_B > 0, sampled_B, greedy(logits_BV)) if "greedy" in used else sampled_B


def _categorical(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Samples a lane, then an id in it: two small draws from softmax(logits) cost less than a large one."""
    categorical = jax.vmap(jax.random.categorical)
    keys_B2 = jax.vmap(jax.random.split)(keys_B)
    lane_B = categorical(keys_B2[:, 0], jnp.log(_pairwise_sum(_laned_weights(logits_BV))))
    lanes_Bnl = _to_lanes(logits_BV, -jnp.inf)
    position_B = categorical(keys_B2[:, 1], jnp.take_along_axis(lanes_Bnl, lane_B[:, None, None], 2)[..., 0])
    return (position_B * LANES + lane_B).astype(jnp.int32)


def logsumexp(logits_BV: jax.Array) -> jax.Array:
    """float32 [B]: the logarithm of the sum of exponentials."""
    logits_BV = logits_BV.astype(jnp.float32)
    return jnp.log(_lane_sum(_laned_weights(logits_BV))) + jnp.max(logits_BV, 1)


def row_sum(x_BV: jax.Array) -> jax.Array:
    """float32 [B]: the sum of each row, in the same order for every B; that of `jnp.sum` depends on B on CPU."""
    return _lane_sum(_to_lanes(x_BV, 0))


def _lane_sum(x_Bnl: jax.Array) -> jax.Array:
    return _pairwise_sum(_pairwise_sum(x_Bnl)[..., None])[:, 0]


def _pairwise_sum(x_Bnl: jax.Array) -> jax.Array:
    """[B, l]: the sum over n by halves: additions of pairs, which a compiler does not reorder."""
    while (n := x_Bnl.shape[1]) > 1:
        half = n - n // 2
        x_Bnl = x_Bnl[:, :half] + jnp.pad(x_Bnl[:, half:], ((0, 0), (0, 2 * half - n), (0, 0)))
    return x_Bnl[:, 0]


def _to_lanes(x_BV: jax.Array, fill_value: int | float) -> jax.Array:
    """[B, n, LANES]: id v is in lane v % LANES."""
    B, V = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -V % LANES)), constant_values=fill_value).reshape(B, -1, LANES)


def logprobs(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """float32 [B], nats: the log-probability of an id in each row's softmax(logits)."""
    logits_B = jnp.take_along_axis(logits_BV.astype(jnp.float32), ids_B[:, None], 1)[:, 0]
    return logits_B - logsumexp(logits_BV)


def alternatives(logits_BV: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Returns the n most likely ids of each row, int32 [B, n], ties by lowest id, and their log-probabilities.

    Args:
      logits_BV: the model's logits, before processing.
      n: static, at most V.
    """
    best_Bn, ids_Bn = jax.lax.top_k(logits_BV.astype(jnp.float32), n)
    return ids_Bn, best_Bn - logsumexp(logits_BV)[:, None]
