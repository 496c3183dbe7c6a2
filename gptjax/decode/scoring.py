"""Scores given texts: the log-probability of each token after the first.

Texts are read into a cache in chunks, several texts of similar length together, and logits exist for one chunk at a
time. Programs are few: one for each batch size, length of a chunk and size of a cache.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.decode import prefill, sampling
from gptjax.decode.engine import round_length
from gptjax.decode.prefill import Decoder
from gptjax.models.cache import Cache

MAX_LOGITS = 1 << 26  # numbers, 256 MiB


class TokenScores(NamedTuple):
    """Scores of a text of T ids, in nats.

    Attributes:
      logprobs: of each id after the first given those before it, float32 [T - 1]; 0 for ids of a tuned prompt,
        which the model does not predict.
      top_ids: the m most likely ids at these positions, int32 [T - 1, m], ties by lowest id.
      top_logprobs: of those, float32 [T - 1, m].
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class ContinuationScore(NamedTuple):
    """Score of a continuation.

    Attributes:
      logprob: of the whole continuation, nats.
      is_greedy: True if each of its ids is the most likely at its position.
    """

    logprob: float
    is_greedy: bool


class Window(NamedTuple):
    """A part of a text that is read by itself, and the number of its last ids that are scored."""

    ids: Sequence[int]
    scored: int


def score_text(decoder: Decoder, ids: Sequence[int], alternatives: int = 0, stride: int = 0) -> TokenScores:
    """Scores one text; see `score_texts`."""
    return score_texts(decoder, [ids], alternatives, stride, batch_size=1)[0]


def score_texts(
    decoder: Decoder, texts: Sequence[Sequence[int]], alternatives: int = 0, stride: int = 0, batch_size: int = 16
) -> list[TokenScores]:
    """Scores texts, in order.

    Args:
      decoder: the model; it reads at most `config.context` ids, so a text has at most one more without a stride.
      texts: ids of each text.
      alternatives: m, number of most likely ids returned for each position.
      stride: longer texts are read in overlapping windows that begin `stride` ids after one another: each id is scored
        once, and after the first window it has at least `context - stride` ids before it. 0: longer texts are refused.
      batch_size: number of texts in a batch.

    Raises:
      ConfigError: invalid arguments.
      DataError: a text without ids, one that is too long, or ids out of range.
    """
    c = decoder.model.config
    if models.kind(decoder.model) != "decoder":
        raise ConfigError("texts are scored by decoders; this model is an encoder or an encoder-decoder")
    for name, value, most in (("stride", stride, c.context), ("alternatives", alternatives, c.vocabulary)):
        if not 0 <= value <= most:
            raise ConfigError(f"{name} is {value}; it must be 0 to {most}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    for ids in texts:
        _check(ids, decoder.model, stride)
    parts = [list(windows(ids, c.context, stride)) for ids in texts]
    flat = [window for text_windows in parts for window in text_windows]
    scores = iter(_in_batches(decoder, [window.ids for window in flat], alternatives, batch_size))
    return [_concatenate([_tail(next(scores), window.scored) for window in text_windows]) for text_windows in parts]


def score_continuation(decoder: Decoder, prompt_ids: Sequence[int], ids: Sequence[int]) -> ContinuationScore:
    """Scores ids that follow a prompt; see `score_continuations`."""
    return score_continuations(decoder, [(prompt_ids, ids)], batch_size=1)[0]


def score_continuations(
    decoder: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> list[ContinuationScore]:
    """Scores (prompt, continuation) pairs, as in multiple-choice tasks.

    Raises:
      ConfigError: an invalid batch size.
      DataError: a prompt without ids, or a text that `score_texts` refuses.
    """
    if not all(len(prompt) for prompt, _ in pairs):
        raise DataError("a prompt has no tokens; give at least one, such as the end of text")
    scores = score_texts(decoder, [[*prompt, *ids] for prompt, ids in pairs], alternatives=1, batch_size=batch_size)
    results = []
    for (_, ids), whole in zip(pairs, scores, strict=True):
        part = _tail(whole, len(ids))
        logprob = float(part.logprobs.sum(dtype=np.float64))
        results.append(ContinuationScore(logprob, bool(np.array_equal(part.top_ids[:, 0], np.asarray(ids, np.int32)))))
    return results


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Yields the windows of a text, of at most context + 1 ids, of which the last is not read."""
    yield Window(ids[: context + 1], min(len(ids) - 1, context))
    for begin in range(stride, len(ids) - context + stride - 1, stride or 1):
        window = ids[begin : begin + context + 1]
        yield Window(window, len(window) - 1 - (context - stride))


def _check(ids: Sequence[int], model: nn.Module, stride: int) -> None:
    config: Any = model.config  # type: ignore[attr-defined]
    if not len(ids):
        raise DataError("a text to score has no tokens")
    if len(ids) - 1 > config.context and not stride:
        raise DataError(
            f"a text to score has {len(ids)} tokens, more than the model's context of {config.context} and one; "
            "give a stride to read it in overlapping windows"
        )
    if np.min(ids) < 0 or np.max(ids) >= models.num_embeddings(model):
        raise DataError(f"ids must lie in 0 to {models.num_embeddings(model) - 1}")
    if len(ids) - 1 > config.context and np.max(ids) >= config.vocabulary:
        raise DataError("a text with a tuned prompt is longer than the model's context; windows would leave that out")


def _tail(scores: TokenScores, n: int) -> TokenScores:
    return TokenScores(*(x[len(x) - n :] for x in scores))


def _concatenate(parts: list[TokenScores]) -> TokenScores:
    return TokenScores(*(np.concatenate(x) for x in zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def score(
    model: nn.Module,
    alternatives: int,
    params: Any,
    ids_BT: jax.Array,
    targets_BT: jax.Array,
    cache: Cache,
    count_B: jax.Array,
) -> tuple[Cache, tuple[jax.Array, ...]]:
    """Extends the cache by a chunk of each row, and scores the ids that follow.

    Args:
      model, alternatives: static.
      params: of the model.
      ids_BT: ids of the chunk.
      targets_BT: the id after each.
      cache: donated.
      count_B: number of the T that are not padding, at least 1.

    Returns:
      The cache, and fields as in `TokenScores` with [B, T] for [T - 1].
    """
    x_BTD, unembedding_VD, cache = models.extend(model, params, ids_BT, cache, count_B)
    B, T, D = x_BTD.shape
    logits_NV = models.next_logits(model, x_BTD.reshape(B * T, D), unembedding_VD)
    targets_N = targets_BT.reshape(B * T)
    logprobs_N = sampling.logprobs(logits_NV, targets_N)
    scores_N = (
        jnp.where(targets_N < logits_NV.shape[-1], logprobs_N, 0),
        *sampling.alternatives(logits_NV, alternatives),
    )
    return cache, tuple(x.reshape(B, T, *x.shape[1:]) for x in scores_N)


def _in_batches(decoder: Decoder, texts: list[Sequence[int]], alternatives: int, batch_size: int) -> list[TokenScores]:
    # Texts of similar length together, the longest first, so that a lack of memory shows at once.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    scores: dict[int, TokenScores] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        B = min(batch_size, prefill.bucket(len(chosen), 1))
        whole = _batch(decoder, [texts[i] for i in chosen], alternatives, B)
        for row, i in enumerate(chosen):
            scores[i] = TokenScores(*(x[row, : len(texts[i]) - 1] for x in whole))
    return [scores[i] for i in range(len(texts))]


def _batch(decoder: Decoder, texts: list[Sequence[int]], alternatives: int, B: int) -> TokenScores:
    # [B, at least T - 1 of the longest text, ...]; rows without a text, or after its end, read id 0.
    c = decoder.model.config
    most = max(len(ids) for ids in texts) - 1
    longest = min(prefill.max_chunk(), c.context)
    while longest > prefill.MIN_CHUNK and B * longest * c.vocabulary > MAX_LOGITS:
        longest //= 2
    length = -(-max(most, 1) // longest) * longest
    ids_BS = np.zeros((B, length + 1), np.int32)
    for row, ids in enumerate(texts):
        ids_BS[row, : len(ids)] = ids
    cache = decoder.empty(B, min(round_length(most), c.context), longest)
    outputs: list[tuple[jax.Array, ...]] = []
    for ids_1T, n in prefill.chunks(range(most), 0, longest):
        begin, T = len(outputs) * longest, ids_1T.shape[1]
        chunk_BT, next_BT = ids_BS[:, begin : begin + T], ids_BS[:, begin + 1 : begin + T + 1]
        cache, output = score(
            decoder.model, alternatives, decoder.params, chunk_BT, next_BT, cache, np.full(B, n, np.int32)
        )
        outputs.append(output)
    if not outputs:
        nothing = np.zeros((B, 0, alternatives))
        return TokenScores(np.zeros((B, 0), np.float32), nothing.astype(np.int32), nothing.astype(np.float32))
    return TokenScores(*(np.concatenate(x, axis=1) for x in zip(*jax.device_get(outputs), strict=True)))
