"""Beam search and diverse beam search for a batch of prompts: many tokens are one program on the device.

Texts and scores equal those of transformers 5 (`_beam_search`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.decode.batching import Batch, batches, capacity, prefill_batch, token_limits
from gptjax.decode.prefill import Decoder, bucket
from gptjax.models import cache as caches
from gptjax.models.cache import Cache, take_rows


class BeamSearchParams(NamedTuple):
    """Parameters of beam search.

    Attributes:
      beams: number of beams of a prompt, over all groups.
      groups: number of groups of beams, each of which avoids the tokens of the groups before it.
      diversity_penalty: nats subtracted for each beam of an earlier group that chose the token at the same step
        (arXiv 1610.02424, Hamming diversity); part of the score.
      length_penalty: the score of a finished hypothesis is the sum of its log-probabilities divided by its number of
        tokens to this power; the end of text counts as a token, the prompt does not. Values above 0 favor longer ones.
      early_stopping: True ends a search with as many finished hypotheses as beams; False when the best live beam would
        score less than all of these if it ended now; "never" when it would at any length.
      best: number of hypotheses returned for each prompt.
    """

    beams: int = 4
    groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    best: int = 1

    def check(self) -> None:
        """Raises ConfigError for an invalid value."""
        for problem in self._problems():
            raise ConfigError(problem)

    def _problems(self) -> list[str]:
        problems = [f"{n} is {getattr(self, n)}; it must be at least 1" for n in COUNTS if not getattr(self, n) >= 1]
        if problems:
            return problems
        if self.best > self.beams:
            problems.append(f"best={self.best} is more than beams={self.beams}; ask for fewer or search with more")
        if self.beams % self.groups:
            problems.append(f"groups={self.groups} does not divide beams={self.beams}")
        if not 0 <= self.diversity_penalty < math.inf:
            problems.append(f"diversity_penalty is {self.diversity_penalty}; it must be at least 0")
        elif (self.groups > 1) != (self.diversity_penalty > 0):
            problems.append("groups of more than 1 and a diversity_penalty of more than 0 must be given together")
        if not math.isfinite(self.length_penalty):
            problems.append(f"length_penalty is {self.length_penalty}; it must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            problems.append(f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"')
        return problems


COUNTS = ("beams", "groups", "best")
INITIAL_CAPACITY = 32  # new tokens
GROWTH_FACTOR = 4  # of the capacity when it is full; each capacity compiles a program


class Hypothesis(NamedTuple):
    """A continuation: its ids, its score, and the log-probability (nats) of each id in the model's distribution."""

    ids: list[int]
    score: float
    logprobs: list[float]


class TracedParams(NamedTuple):
    """Traced parameters of a search: other values compile no other program."""

    diversity_penalty: jax.Array | float
    length_penalty: jax.Array | float
    stop_when_full: jax.Array | bool
    never_stop_early: jax.Array | bool  # early_stopping="never"
    ends_E: jax.Array | np.ndarray  # ids that end a continuation
    forced: jax.Array | int = 0  # number of prompt tokens that count as new ones, of probability 1


class Group(NamedTuple):
    """A beam group: W live beams, W finished hypotheses, and `open` while the search continues. Empty ones score -inf.

    The groups of all rows have leading axes B, G.
    """

    ids_WT: jax.Array  # int32
    logprobs_WT: jax.Array  # float32
    score_W: jax.Array  # float32, sums of log-probabilities, best first
    done_ids_WT: jax.Array
    done_logprobs_WT: jax.Array
    done_length_W: jax.Array  # int32, number of tokens
    done_score_W: jax.Array  # best first
    open: jax.Array  # bool


def init_groups(limit_B: jax.Array, groups: int, width: int, T: int) -> Group:
    """Returns B x G groups with the prompt as their first beam and no others."""
    shape = len(limit_B), groups, width
    ids, logprobs = jnp.zeros((*shape, T), jnp.int32), jnp.zeros((*shape, T), jnp.float32)
    none = jnp.full(shape, -jnp.inf)
    is_open = jnp.broadcast_to(limit_B[:, None] > 0, shape[:2])
    lengths = jnp.zeros(shape, jnp.int32)
    return Group(ids, logprobs, none.at[..., 0].set(0), ids, logprobs, lengths, none, is_open)


def advance_group(
    group: Group, logprob_WV: jax.Array, taken_V: jax.Array, step: jax.Array, limit: jax.Array, traced: TracedParams
) -> tuple[Group, jax.Array, jax.Array]:
    """Advances one group of one row by a token.

    Args:
      group: after `step` tokens.
      logprob_WV: log-probabilities of the next token of each beam.
      taken_V: number of beams of earlier groups that chose each token at this step.
      step: number of new tokens so far.
      limit: maximum number of new tokens.
      traced: parameters of the search.

    Returns:
      The group, parent_W (index of the beam that each continues), and token_W.
    """
    W, V = logprob_WV.shape
    length = step + 1
    # Of K candidates at least W do not end here, however many of the E ends are among the most likely.
    K = min(max(2, 1 + len(traced.ends_E)) * W, W * V)
    total_WV = group.score_W[:, None] + logprob_WV - traced.diversity_penalty * taken_V
    score_K, flat_K = jax.lax.top_k(total_WV.reshape(-1), K)
    parent_K, token_K = flat_K // V, flat_K % V
    ids_KT = group.ids_WT[parent_K].at[:, step].set(token_K)
    logprobs_KT = group.logprobs_WT[parent_K].at[:, step].set(logprob_WV[parent_K, token_K])
    ended_K = (token_K[:, None] == traced.ends_E).any(-1)

    live_score_W, live_W = jax.lax.top_k(jnp.where(ended_K, -jnp.inf, score_K), W)
    # A candidate that ends is kept only if it is among the W best, where it would have been a beam.
    finished_K = (ended_K | (length >= limit)) & (jnp.arange(K) < W) & group.open
    tokens = (length + traced.forced).astype(jnp.float32)
    final_K = jnp.where(finished_K, score_K / tokens**traced.length_penalty, -jnp.inf)
    done_W, best_W = jax.lax.top_k(jnp.concatenate([group.done_score_W, final_K]), W)

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, new])[best_W]

    attainable = jnp.where(traced.never_stop_early & (traced.length_penalty > 0), limit + traced.forced, tokens)
    is_open = group.open & (length < limit) & (live_score_W[0] / attainable**traced.length_penalty > done_W[-1])
    is_open &= ~(traced.stop_when_full & (done_W[-1] > -jnp.inf))
    after = Group(
        ids_KT[live_W],
        logprobs_KT[live_W],
        live_score_W,
        merge(group.done_ids_WT, ids_KT),
        merge(group.done_logprobs_WT, logprobs_KT),
        merge(group.done_length_W, jnp.full(K, length)),
        done_W,
        is_open,
    )
    return after, parent_K[live_W], token_K[live_W]


def advance_groups(
    groups: Group, logprob_GWV: jax.Array, step: jax.Array, limit: jax.Array, traced: TracedParams
) -> tuple[Group, jax.Array, jax.Array]:
    """Advances all groups of one row in order, as `advance_group`; returns groups, parent_GW and token_GW."""

    def one(taken_V: jax.Array, inputs: tuple[Group, jax.Array]) -> tuple[jax.Array, Any]:
        group, logprob_WV = inputs
        after, parent_W, token_W = advance_group(group, logprob_WV, taken_V, step, limit, traced)
        is_live_W = group.open & (after.score_W > -jnp.inf)
        return taken_V.at[token_W].add(is_live_W), (after, parent_W, token_W)

    V = logprob_GWV.shape[-1]
    return jax.lax.scan(one, jnp.zeros(V), (groups, logprob_GWV))[1]  # type: ignore[no-any-return]


class SearchState(NamedTuple):
    """State of a search of B rows after `step` new tokens; N = B * G * W beams, those of a row are adjacent."""

    step: jax.Array
    cache: Cache  # of N rows, with the encoder output of B sources
    token_N: jax.Array  # the next input token of each beam
    groups: Group  # [B, G, ...], with a capacity of T new tokens


@partial(jax.jit, static_argnames="model", donate_argnames="search")
def run_search(
    model: nn.Module, params: Any, search: SearchState, limit_B: jax.Array, traced: TracedParams
) -> SearchState:
    """Runs a search to its end or to its capacity of new tokens.

    Args:
      model, params: with unrolled layers.
      search: donated.
      limit_B: maximum number of new tokens of each row.
      traced: parameters of the search.
    """
    B, G, W, T = search.groups.ids_WT.shape
    first_BG1 = jnp.arange(B * G * W).reshape(B, G, W)[:, :, :1]

    def cond(search: SearchState) -> jax.Array:
        return search.groups.open.any() & (search.step < T)

    def body(search: SearchState) -> SearchState:
        step, cache, token_N, state = search
        x_N1D, unembedding_VD, cache = models.extend(model, params, token_N[:, None], cache)
        logprob_NV = jax.nn.log_softmax(models.next_logits(model, x_N1D[:, 0], unembedding_VD))
        logprob_BGWV = logprob_NV.reshape(B, G, W, -1)
        each_row = jax.vmap(advance_groups, in_axes=(0, 0, None, 0, None))
        state, parent_BGW, token_BGW = each_row(state, logprob_BGWV, step, limit_B, traced)
        return SearchState(
            step + 1, take_rows(cache, (first_BG1 + parent_BGW).reshape(-1)), token_BGW.reshape(-1), state
        )

    return jax.lax.while_loop(cond, body, search)


def best_hypotheses(row: Group, best: int) -> list[Hypothesis]:
    """Returns the best finished hypotheses of one row, over all its groups [G, W], in NumPy."""
    ids_NT, logprobs_NT = (x.reshape(-1, x.shape[-1]) for x in (row.done_ids_WT, row.done_logprobs_WT))
    length_N, score_N = row.done_length_W.reshape(-1), row.done_score_W.reshape(-1)
    order_N = np.argsort(-score_N, kind="stable")[:best]
    return [
        Hypothesis(ids_NT[i, : length_N[i]].tolist(), float(score_N[i]), logprobs_NT[i, : length_N[i]].tolist())
        for i in order_N
        if score_N[i] > -np.inf
    ]


def search(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: BeamSearchParams,
    max_tokens: int,
    ends: Sequence[int] = (),
    batch_size: int = 8,
    sources: Sequence[Sequence[int]] = (),
) -> list[list[Hypothesis]]:
    """Returns the best hypotheses of each prompt, best first; an id that ends the text is the last of its ids.

    Args:
      decoder: the model.
      prompts: ids of each prompt, of any lengths.
      settings: parameters of the search.
      max_tokens: maximum number of new tokens; fewer where the model's context ends before.
      ends: ids that end a continuation.
      batch_size: number of prompts in a batch; it allocates `batch_size * settings.beams` rows.
      sources: ids of each source, for an encoder-decoder. All but the first id of its prompts are forced, and count as
        new ones in scores.

    Raises:
      ConfigError: invalid settings.
      DataError: an invalid prompt.
    """
    settings.check()
    # The last new token is never read, so it needs no place in the context.
    most = token_limits(prompts, max_tokens, decoder.model.config.context + 1)
    hypotheses: list[list[Hypothesis]] = []
    for batch in batches(prompts, most, batch_size, sources):
        groups = jax.device_get(_search_batch(decoder, batch, settings, ends))
        each = (Group(*(x[b] for x in groups)) for b in range(len(batch.prompts)))
        hypotheses += [best_hypotheses(row, settings.best) for row in each]
    return hypotheses


def _search_batch(decoder: Decoder, batch: Batch, settings: BeamSearchParams, ends: Sequence[int]) -> Group:
    traced = TracedParams(
        float(settings.diversity_penalty),
        float(settings.length_penalty),
        # One beam is greedy search, as in transformers: it ends with the first end token.
        settings.early_stopping is True or settings.beams == 1,
        settings.early_stopping == "never",
        np.array(sorted(set(ends)), np.int32),
        len(batch.prompts[0]) - 1 if batch.sources else 0,
    )
    search, T = None, 0
    # The capacity grows with the texts: most end long before their limit, and the buffers are moved at every token.
    while search is None or (T < batch.limit_B.max() and jax.device_get(search.groups.open).any()):
        T = min(GROWTH_FACTOR * T or INITIAL_CAPACITY, bucket(int(batch.limit_B.max()), INITIAL_CAPACITY))
        search = _prefill_state(decoder, batch, settings, T) if search is None else _grow(decoder, batch, search, T)
        search = run_search(decoder.model, decoder.params, search, batch.limit_B, traced)
    return search.groups


def _capacity(batch: Batch, T: int) -> int:
    # The last new token is never read. Prompts have any length, but those of encoder-decoders are short.
    return capacity(batch, min(T, int(batch.limit_B.max())) - 1, INITIAL_CAPACITY if batch.sources else 64)


@partial(jax.jit, static_argnames=("groups", "width", "T"))
def _init_state(cache: Cache, last_B: jax.Array, limit_B: jax.Array, groups: int, width: int, T: int) -> SearchState:
    beams, start = groups * width, init_groups(limit_B, groups, width, T)
    return SearchState(jnp.zeros((), jnp.int32), caches.repeat_rows(cache, beams), jnp.repeat(last_B, beams), start)


def _prefill_state(decoder: Decoder, batch: Batch, settings: BeamSearchParams, T: int) -> SearchState:
    cache = prefill_batch(decoder, batch, _capacity(batch, T))
    width = settings.beams // settings.groups
    return _init_state(cache, batch.last_B, batch.limit_B, settings.groups, width, T)


def _grow(decoder: Decoder, batch: Batch, search: SearchState, T: int) -> SearchState:
    """Returns the search with a capacity of T new tokens."""
    more = T - search.groups.ids_WT.shape[-1]

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])

    groups = search.groups
    groups = groups._replace(**{name: pad(getattr(groups, name)) for name in Group._fields if name.endswith("_WT")})
    layers = jax.eval_shape(lambda: decoder.empty(len(search.token_N), _capacity(batch, T), 1)).layers
    cache = search.cache._replace(layers=caches.pad_to(search.cache.layers, layers))
    return search._replace(cache=cache, groups=groups)
