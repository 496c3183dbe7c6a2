"""How likely a model finds texts that are given: the log-probability of each token after the first.

Texts are read into a cache in pieces, several texts of about one length together, and logits are there for one piece at
a time; nothing is drawn. Programs are few: one for each number of rows, length of a piece and size of a cache.
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
    """What a model says of a text of T ids, in nats.

    Attributes:
      logprobs: of each id after the first given those before it, float32 [T - 1]; 0 of a tuned prompt's, which is no
        part of what a model says.
      likeliest: what would have been likeliest there, int32 [T - 1, m], likeliest and lowest id first.
      likeliest_logprobs: of those, float32 [T - 1, m].
    """

    logprobs: np.ndarray
    likeliest: np.ndarray
    likeliest_logprobs: np.ndarray


class ContinuationScore(NamedTuple):
    """What a model says of a continuation.

    Attributes:
      logprob: of all of it, nats.
      is_greedy: whether each of its ids is the likeliest there.
    """

    logprob: float
    is_greedy: bool


class Window(NamedTuple):
    """A part of a text that is read by itself, and how many ids of its end are scored."""

    ids: Sequence[int]
    scored: int


def score_text(decoder: Decoder, ids: Sequence[int], alternatives: int = 0, stride: int = 0) -> TokenScores:
    """What a model says of one text; see `scored_all`."""
    return score_texts(decoder, [ids], alternatives, stride, batch_size=1)[0]


def score_texts(
    decoder: Decoder, texts: Sequence[Sequence[int]], alternatives: int = 0, stride: int = 0, batch_size: int = 16
) -> list[TokenScores]:
    """What a model says of texts, in their order.

    Args:
      of: the model; it reads `config.context` ids at most, so a text has one more at most, unless there is a stride.
      texts: ids of each.
      alternatives: m, how many of the likeliest ids are told at each place.
      stride: for longer texts, which are read in windows that begin so many ids after one another: each id is scored
        once, and but for the first window's it has at least `context - stride` ids before it. 0: they are refused.
      batch_size: how many texts are read together.

    Raises:
      ConfigError: numbers that cannot be.
      DataError: a text without ids, one that is too long, ids out of range.
    """
    c = decoder.model.config
    if models.kind(decoder.model) != "decoder":
        raise ConfigError("texts are scored by decoders; this model reads a source, or reads each text whole")
    for name, value, most in (("stride", stride, c.context), ("alternatives", alternatives, c.vocabulary)):
        if not 0 <= value <= most:
            raise ConfigError(f"{name} is {value}; it must be 0 to {most}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    for ids in texts:
        _check(ids, decoder.model, stride)
    parts = [list(windows(ids, c.context, stride)) for ids in texts]
    every = [window for of_text in parts for window in of_text]
    done = iter(_in_batches(decoder, [window.ids for window in every], alternatives, batch_size))
    return [_concatenate([_tail(next(done), window.scored) for window in of_text]) for of_text in parts]


def score_continuation(decoder: Decoder, prompt_ids: Sequence[int], ids: Sequence[int]) -> ContinuationScore:
    """What a model says of ids that follow a prompt; see `continuations`."""
    return score_continuations(decoder, [(prompt_ids, ids)], batch_size=1)[0]


def score_continuations(
    decoder: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> list[ContinuationScore]:
    """What a model says of (prompt, continuation)s, as tasks with several choices ask it.

    Raises:
      ConfigError: an invalid batch size.
      DataError: a prompt without ids, or what `scored_all` refuses.
    """
    if not all(len(prompt) for prompt, _ in pairs):
        raise DataError("a prompt has no tokens; give at least one, such as the end of the document before")
    found = score_texts(decoder, [[*prompt, *ids] for prompt, ids in pairs], alternatives=1, batch_size=batch_size)
    said = []
    for (_, ids), whole in zip(pairs, found, strict=True):
        part = _tail(whole, len(ids))
        logprob = float(part.logprobs.sum(dtype=np.float64))
        said.append(ContinuationScore(logprob, bool(np.array_equal(part.likeliest[:, 0], np.asarray(ids, np.int32)))))
    return said


def windows(ids: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """The windows of a text: context + 1 ids at most, of which the last is not read."""
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
    if np.min(ids) < 0 or np.max(ids) >= models.readable(model):
        raise DataError(f"ids must lie in 0 to {models.readable(model) - 1}")
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
    """The cache after some more ids of each row, and what the model says of the ids after those.

    The latter is as of `Scored`, with [B, T] for [T - 1].

    Args:
      model, alternatives: static.
      params: of the model.
      ids_BT: what is read.
      targets_BT: the id after each.
      cache: given up.
      count_B: how many of the T are real, at least 1.
    """
    x_BTD, table_VD, cache = models.extend(model, params, ids_BT, cache, count_B)
    B, T, D = x_BTD.shape
    logits_NV = models.next_logits(model, x_BTD.reshape(B * T, D), table_VD)
    targets_N = targets_BT.reshape(B * T)
    logprobs_N = sampling.logprobs(logits_NV, targets_N)
    said_N = (
        jnp.where(targets_N < logits_NV.shape[-1], logprobs_N, 0),
        *sampling.alternatives(logits_NV, alternatives),
    )
    return cache, tuple(x.reshape(B, T, *x.shape[1:]) for x in said_N)


def _in_batches(decoder: Decoder, texts: list[Sequence[int]], alternatives: int, batch_size: int) -> list[TokenScores]:
    # Texts of about one length together, the longest first: if there is no memory for them, that shows at once.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: dict[int, TokenScores] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        B = min(batch_size, prefill.bucket(len(chosen), 1))
        whole = _batch(decoder, [texts[i] for i in chosen], alternatives, B)
        for row, i in enumerate(chosen):
            found[i] = TokenScores(*(x[row, : len(texts[i]) - 1] for x in whole))
    return [found[i] for i in range(len(texts))]


def _batch(decoder: Decoder, texts: list[Sequence[int]], alternatives: int, B: int) -> TokenScores:
    # [B, at least T - 1 of the longest text, ...]; rows that have no text, or no more of it, read id 0.
    c = decoder.model.config
    most = max(len(ids) for ids in texts) - 1
    longest = min(prefill.max_chunk(), c.context)
    while longest > prefill.MIN_CHUNK and B * longest * c.vocabulary > MAX_LOGITS:
        longest //= 2
    room = -(-max(most, 1) // longest) * longest
    ids_BS = np.zeros((B, room + 1), np.int32)
    for row, ids in enumerate(texts):
        ids_BS[row, : len(ids)] = ids
    cache = decoder.empty(B, min(round_length(most), c.context), longest)
    said: list[tuple[jax.Array, ...]] = []
    for ids_1T, n in prefill.chunks(range(most), 0, longest):
        begin, T = len(said) * longest, ids_1T.shape[1]
        piece_BT, next_BT = ids_BS[:, begin : begin + T], ids_BS[:, begin + 1 : begin + T + 1]
        cache, now = score(
            decoder.model, alternatives, decoder.params, piece_BT, next_BT, cache, np.full(B, n, np.int32)
        )
        said.append(now)
    if not said:
        nothing = np.zeros((B, 0, alternatives))
        return TokenScores(np.zeros((B, 0), np.float32), nothing.astype(np.int32), nothing.astype(np.float32))
    return TokenScores(*(np.concatenate(x, axis=1) for x in zip(*jax.device_get(said), strict=True)))
