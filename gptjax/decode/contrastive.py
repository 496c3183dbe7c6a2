"""Contrastive search (arXiv 2202.06417): likely tokens whose hidden states differ from the previous ones.

Deterministic, on token ids. A search is one program on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.decode import prefill
from gptjax.decode.batching import Batch, batches, bucket, capacity, init_batch_cache, init_row_cache, token_limits
from gptjax.decode.prefill import Decoder
from gptjax.models import cache as caches
from gptjax.models.cache import Cache, take_rows


class ContrastiveSearchParams(NamedTuple):
    """Parameters of contrastive search (arXiv 2202.06417 equation 5).

    Attributes:
      alpha: weight of the degeneration penalty against the probability; 0 is greedy.
      k: number of most likely tokens that are candidates; 1 is greedy.
    """

    alpha: float = 0.6
    k: int = 4

    def check(self) -> None:
        """Raises ConfigError for an invalid value."""
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; it must be from 0 to 1")
        if not self.k >= 1:
            raise ConfigError(f"k is {self.k}; it must be at least 1")


class Completion(NamedTuple):
    """Ids of a continuation, and the log-probability (nats) of each in the model's distribution."""

    ids: list[int]
    logprobs: list[float]


class State(NamedTuple):
    """Search state of B rows with k candidates each; those of row b are rows b * k to b * k + k - 1 of the cache."""

    cache: Cache
    h_BCD: jax.Array  # float32, directions of the hidden states of previous tokens
    token_Bk: jax.Array  # candidates
    logprob_Bk: jax.Array
    ids_BT: jax.Array
    logprobs_BT: jax.Array
    length_B: jax.Array  # int32, new tokens
    active_B: jax.Array


def direction(x: jax.Array) -> jax.Array:
    """Returns x / |x| in float32, over the last axis, for the head's input x: the last hidden state after its norm."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnums=0)
def extend(
    model: nn.Module, params: Any, ids_1T: jax.Array, cache: Cache, n: jax.Array, h_CD: jax.Array
) -> tuple[Cache, jax.Array]:
    """Returns the cache extended by the first n of T more tokens, and h_CD with their directions."""
    C, T = len(h_CD), ids_1T.shape[1]
    x_1TD, _, after = models.extend(model, params, ids_1T, cache, n[None])
    positions_T = jnp.where(jnp.arange(T) < n, cache.length_B[0] + jnp.arange(T), C)
    return after, h_CD.at[positions_T].set(direction(x_1TD[0, :, : h_CD.shape[1]]), mode="drop")


@partial(jax.jit, donate_argnums=(0, 1))
def _put_row(cache: Cache, h_BCD: jax.Array, row: jax.Array, single: Cache, h_CD: jax.Array) -> tuple[Cache, jax.Array]:
    return caches.put(cache, row, single), h_BCD.at[row].set(h_CD)


def prefill_batch(decoder: Decoder, batch: Batch) -> tuple[Cache, jax.Array]:
    """Returns a cache prefilled with all but the last token of each prompt, and h_BCD of these tokens."""
    C, D = capacity(batch, int(batch.limit_B.max())), decoder.model.config.width
    cache, h_BCD = init_batch_cache(decoder, batch, C), jnp.zeros((batch.rows, C, D))
    longest = prefill.max_chunk()
    for row, ids in enumerate(batch.prompts):
        single, h_CD = init_row_cache(decoder, cache, row, C), jnp.zeros((C, D))
        for ids_1T, n in prefill.chunks(ids[:-1], 0, longest):
            single, h_CD = extend(decoder.model, decoder.params, ids_1T, single, jnp.asarray(n), h_CD)
        cache, h_BCD = _put_row(cache, h_BCD, jnp.asarray(row), single._replace(encoder_output=None), h_CD)
    return cache, h_BCD


def select_candidate(
    prob_Bk: jax.Array, h_BkD: jax.Array, h_BCD: jax.Array, length_B: jax.Array, alpha: Any
) -> jax.Array:
    """Selects a candidate of each row: argmax (1 - alpha) p - alpha max cosine (arXiv 2202.06417 equation 5).

    Args:
      prob_Bk: probability of each candidate.
      h_BkD, h_BCD: directions of the hidden states of the candidates and of the tokens before them.
      length_B: number of the C that are tokens before them.
      alpha: weight of the penalty.

    Returns:
      int32 [B], index of the candidate.
    """
    cosine_BkC = jnp.einsum("bkd,bcd->bkc", h_BkD, h_BCD)
    before_B1C = (jnp.arange(h_BCD.shape[1]) < length_B[:, None])[:, None]
    penalty_Bk = jnp.max(cosine_BkC, axis=-1, initial=-1.0, where=before_B1C)
    return jnp.argmax((1 - alpha) * prob_Bk - alpha * penalty_Bk, axis=-1)


def initial_state(cache: Cache, h_BCD: jax.Array, last_B: jax.Array, limit_B: jax.Array, k: int, T: int) -> State:
    """Returns the state of `run_search` before it reads the last token of each prompt; for its arguments see there."""
    B = len(last_B)
    return State(
        caches.repeat_rows(cache, k),
        h_BCD,
        jnp.repeat(last_B[:, None], k, axis=1),
        jnp.zeros((B, k)),
        jnp.zeros((B, T), jnp.int32),
        jnp.zeros((B, T)),
        jnp.zeros(B, jnp.int32),
        limit_B > 0,
    )


@partial(jax.jit, static_argnames=("model", "k", "T"))
def run_search(
    model: nn.Module,
    params: Any,
    cache: Cache,
    h_BCD: jax.Array,
    last_B: jax.Array,
    limit_B: jax.Array,
    ends_E: jax.Array,
    alpha: jax.Array | float,
    *,
    k: int,
    T: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ids_BT and logprobs_BT of the continuations, and length_B, the number of their tokens.

    Args:
      model, params: with unrolled layers.
      cache, h_BCD: from `prefill_batch`.
      last_B: the last token of each prompt.
      limit_B: maximum number of new tokens of each, at most T.
      ends_E: ids that end a continuation.
      alpha, k: as in `ContrastiveSearchParams`.
      T: size of the results.
    """
    B = len(last_B)
    rows_B = jnp.arange(B)

    def body(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, s = carry
        read_B = s.cache.length_B[::k]
        x_N1D, unembedding_VD, cache = models.extend(model, params, s.token_Bk.reshape(B * k, 1), s.cache)
        x_BkD = x_N1D.reshape(B, k, -1)
        h_BkD = direction(x_BkD[..., : s.h_BCD.shape[-1]])  # without the 1 that a head's bias is multiplied by
        best_B = select_candidate(jnp.exp(s.logprob_Bk), h_BkD, s.h_BCD, read_B, alpha)
        token_B, logprob_B = s.token_Bk[rows_B, best_B], s.logprob_Bk[rows_B, best_B]
        # Step 0 reads the prompt's last token in place of candidates, and outputs nothing.
        slot_B = jnp.where(s.active_B & (step > 0), step - 1, T)
        length_B = jnp.where(s.active_B, step, s.length_B)
        ended_B = (token_B[:, None] == ends_E).any(-1) & (step > 0)
        logprob_BV = jax.nn.log_softmax(models.next_logits(model, x_BkD[rows_B, best_B], unembedding_VD))
        candidate_logprob_Bk, candidate_Bk = jax.lax.top_k(logprob_BV, k)
        return step + 1, State(
            take_rows(cache, jnp.repeat(rows_B * k + best_B, k)),
            s.h_BCD.at[rows_B, read_B].set(h_BkD[rows_B, best_B], mode="drop"),
            candidate_Bk,
            candidate_logprob_Bk,
            s.ids_BT.at[rows_B, slot_B].set(token_B, mode="drop"),
            s.logprobs_BT.at[rows_B, slot_B].set(logprob_B, mode="drop"),
            length_B,
            s.active_B & ~ended_B & (length_B < limit_B),
        )

    zero, start = jnp.zeros((), jnp.int32), initial_state(cache, h_BCD, last_B, limit_B, k, T)
    end = jax.lax.while_loop(lambda carry: carry[1].active_B.any(), body, (zero, start))[1]
    return end.ids_BT, end.logprobs_BT, end.length_B


def search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: ContrastiveSearchParams,
    max_tokens: int,
    ends: Sequence[int] = (),
    batch_size: int = 8,
    sources: Sequence[Sequence[int]] = (),
) -> list[Completion]:
    """Continues each prompt by contrastive search; an id that ends the text is the last of its ids.

    Args:
      decoder: the model.
      prompts: ids of each prompt, of any lengths.
      settings: parameters of the search.
      max_tokens: maximum number of new tokens; fewer where the model's context ends before.
      ends: ids that end a continuation.
      batch_size: number of prompts in a batch; it allocates `batch_size * settings.k` rows.
      sources: ids of each source, for an encoder-decoder.

    Raises:
      ConfigError: invalid settings.
      DataError: an invalid prompt.
    """
    settings.check()
    config = decoder.model.config
    # Every new token is read, the last one too, since its hidden state is needed to select it.
    most = token_limits(prompts, max_tokens, config.context)
    completions: list[Completion] = []
    for batch in batches(prompts, most, batch_size, sources):
        outputs = run_search(
            decoder.model,
            decoder.params,
            *prefill_batch(decoder, batch),
            batch.last_B,
            batch.limit_B,
            np.array(sorted(set(ends)), np.int32),
            float(settings.alpha),
            k=min(settings.k, config.vocabulary),
            T=bucket(int(batch.limit_B.max())),
        )
        ids_BT, logprobs_BT, length_B = jax.device_get(outputs)
        for b, n in enumerate(length_B[: len(batch.prompts)]):
            completions.append(Completion(ids_BT[b, :n].tolist(), logprobs_BT[b, :n].tolist()))
    return completions
