"""Beam search, plain or in groups that differ, for a batch of prompts: many tokens are one program on the device.

The rules are those of transformers 5 (`_beam_search`), so that texts and scores are the same as there. Nothing here
knows text.
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
from gptjax.models.cache import Cache, taken


class BeamSearchParams(NamedTuple):
    """How to search.

    Attributes:
      beams: how many continuations of a prompt are kept at each step, over all groups.
      groups: into how many groups the beams are divided, each of which avoids the tokens of those before it.
      diversity_penalty: nats that a token loses for each beam of an earlier group that took it at the same step
        (arXiv 1610.02424, Hamming diversity); part of the score.
      length_penalty: a finished continuation's score is the sum of its log-probabilities / its tokens ** this; the
        end of text counts as a token, the prompt does not. More than 0 is for longer ones.
      early_stopping: True ends a search with as many finished continuations as beams; False when the best unfinished
        one would score less than all of these if it ended here; "never" when it would whatever its length.
      best: how many continuations of each prompt are returned.
    """

    beams: int = 4
    groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    best: int = 1

    def check(self) -> None:
        """Raises ConfigError for settings that mean nothing."""
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
INITIAL_CAPACITY = 32  # new tokens that a search has room for at first
GROWTH_FACTOR = 4  # how many times as many, when it has that many: each room is a program


class Hypothesis(NamedTuple):
    """A continuation: its ids, its score, and each id's log-probability (nats) in the model's own distribution."""

    ids: list[int]
    score: float
    logprobs: list[float]


class TracedParams(NamedTuple):
    """What of `Beams` is a number to the program, so that another value compiles nothing."""

    diversity_penalty: jax.Array | float
    length_penalty: jax.Array | float
    stop_when_full: jax.Array | bool
    hope_for_length: jax.Array | bool  # early_stopping="never"
    ends_E: jax.Array | np.ndarray  # ids that end a continuation
    forced: jax.Array | int = 0  # tokens of the prompt that count as new ones, of probability 1


class Group(NamedTuple):
    """W beams that go on, W finished ones, and whether the search goes on. Scores are -inf where there is none yet.

    Those of all groups and rows have the axes B, G before these.
    """

    ids_WT: jax.Array  # int32
    logprobs_WT: jax.Array  # float32
    score_W: jax.Array  # float32, sums, best first
    done_ids_WT: jax.Array
    done_logprobs_WT: jax.Array
    done_length_W: jax.Array  # int32, tokens
    done_score_W: jax.Array  # best first
    open: jax.Array  # bool


def init_groups(limit_B: jax.Array, groups: int, width: int, T: int) -> Group:
    """B x G groups whose first beam is the prompt; the others come to be as its continuations."""
    shape = len(limit_B), groups, width
    ids, logprobs = jnp.zeros((*shape, T), jnp.int32), jnp.zeros((*shape, T), jnp.float32)
    none = jnp.full(shape, -jnp.inf)
    is_open = jnp.broadcast_to(limit_B[:, None] > 0, shape[:2])
    lengths = jnp.zeros(shape, jnp.int32)
    return Group(ids, logprobs, none.at[..., 0].set(0), ids, logprobs, lengths, none, is_open)


def advance_group(
    group: Group, logprob_WV: jax.Array, taken_V: jax.Array, step: jax.Array, limit: jax.Array, rules: TracedParams
) -> tuple[Group, jax.Array, jax.Array]:
    """One group of one row a token further: the group, parent_W that each beam came from, and token_W.

    Args:
      group: after `step` tokens.
      logprob_WV: of its beams' next tokens.
      taken_V: how many beams of earlier groups took each token at this step.
      step: how many new tokens there are.
      limit: how many there may be.
      rules: of the search.
    """
    W, V = logprob_WV.shape
    length = step + 1
    # Of so many candidates at least W do not end here, however many of the E ends are among the likeliest.
    K = min(max(2, 1 + len(rules.ends_E)) * W, W * V)
    total_WV = group.score_W[:, None] + logprob_WV - rules.diversity_penalty * taken_V
    score_K, flat_K = jax.lax.top_k(total_WV.reshape(-1), K)
    parent_K, token_K = flat_K // V, flat_K % V
    ids_KT = group.ids_WT[parent_K].at[:, step].set(token_K)
    logprobs_KT = group.logprobs_WT[parent_K].at[:, step].set(logprob_WV[parent_K, token_K])
    ended_K = (token_K[:, None] == rules.ends_E).any(-1)

    live_W, on_W = jax.lax.top_k(jnp.where(ended_K, -jnp.inf, score_K), W)
    # A candidate that ends is kept only where it is among the W best, for then it would have been a beam.
    finished_K = (ended_K | (length >= limit)) & (jnp.arange(K) < W) & group.open
    tokens = (length + rules.forced).astype(jnp.float32)
    final_K = jnp.where(finished_K, score_K / tokens**rules.length_penalty, -jnp.inf)
    done_W, best_W = jax.lax.top_k(jnp.concatenate([group.done_score_W, final_K]), W)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, new])[best_W]

    hoped = jnp.where(rules.hope_for_length & (rules.length_penalty > 0), limit + rules.forced, tokens)
    is_open = group.open & (length < limit) & (live_W[0] / hoped**rules.length_penalty > done_W[-1])
    is_open &= ~(rules.stop_when_full & (done_W[-1] > -jnp.inf))
    after = Group(
        ids_KT[on_W],
        logprobs_KT[on_W],
        live_W,
        merged(group.done_ids_WT, ids_KT),
        merged(group.done_logprobs_WT, logprobs_KT),
        merged(group.done_length_W, jnp.full(K, length)),
        done_W,
        is_open,
    )
    return after, parent_K[on_W], token_K[on_W]


def advance_groups(
    groups: Group, logprob_GWV: jax.Array, step: jax.Array, limit: jax.Array, rules: TracedParams
) -> tuple[Group, jax.Array, jax.Array]:
    """All groups of one row a token further, one after the other, as `advanced`: groups, parent_GW, token_GW."""

    def one(taken_V: jax.Array, inputs: tuple[Group, jax.Array]) -> tuple[jax.Array, Any]:
        group, logprob_WV = inputs
        after, parent_W, token_W = advance_group(group, logprob_WV, taken_V, step, limit, rules)
        counts_W = group.open & (after.score_W > -jnp.inf)
        return taken_V.at[token_W].add(counts_W), (after, parent_W, token_W)

    V = logprob_GWV.shape[-1]
    return jax.lax.scan(one, jnp.zeros(V), (groups, logprob_GWV))[1]  # type: ignore[no-any-return]


class SearchState(NamedTuple):
    """A batch of B rows after `step` new tokens; N = B * G * W beams, those of a row after one another."""

    step: jax.Array
    cache: Cache  # of N rows, and what B sources are heard as
    token_N: jax.Array  # what each beam reads next
    groups: Group  # [B, G, ...], with room for T new tokens


@partial(jax.jit, static_argnames="model", donate_argnames="search")
def run_search(
    model: nn.Module, params: Any, search: SearchState, limit_B: jax.Array, rules: TracedParams
) -> SearchState:
    """The search at its end, or with as many new tokens as there is room for.

    Args:
      model, params: whose layers are unrolled.
      search: given up.
      limit_B: the most new tokens of each row.
      rules: of the search.
    """
    B, G, W, T = search.groups.ids_WT.shape
    first_BG1 = jnp.arange(B * G * W).reshape(B, G, W)[:, :, :1]

    def goes_on(search: SearchState) -> jax.Array:
        return search.groups.open.any() & (search.step < T)

    def further(search: SearchState) -> SearchState:
        step, cache, token_N, state = search
        x_N1D, table_VD, cache = models.extend(model, params, token_N[:, None], cache)
        logprob_NV = jax.nn.log_softmax(models.next_logits(model, x_N1D[:, 0], table_VD))
        logprob_BGWV = logprob_NV.reshape(B, G, W, -1)
        each_row = jax.vmap(advance_groups, in_axes=(0, 0, None, 0, None))
        state, parent_BGW, token_BGW = each_row(state, logprob_BGWV, step, limit_B, rules)
        return SearchState(step + 1, taken(cache, (first_BG1 + parent_BGW).reshape(-1)), token_BGW.reshape(-1), state)

    return jax.lax.while_loop(goes_on, further, search)


def best_hypotheses(row: Group, best: int) -> list[Hypothesis]:
    """The best finished continuations of one row, of all its groups [G, W], in NumPy."""
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
    """The best continuations of each prompt, best first; what ends a text is their last id.

    Args:
      of: who goes on.
      prompts: ids of each, of any lengths.
      settings: how to search.
      max_tokens: the most new tokens; fewer where the model's context ends before.
      ends: ids that end a continuation.
      batch_size: how many prompts are searched at once; memory is for `batch_size * settings.beams` rows.
      sources: of an encoder-decoder, what its encoder reads for each. Of its prompts, all but the first id count as new
        ones in scores, for they are forced.

    Raises:
      ConfigError, DataError: settings or a prompt that cannot be.
    """
    settings.check()
    # The last new token is never read, so it needs no place in the context.
    most = token_limits(prompts, max_tokens, decoder.model.config.context + 1)
    found: list[list[Hypothesis]] = []
    for batch in batches(prompts, most, batch_size, sources):
        groups = jax.device_get(_search_batch(decoder, batch, settings, ends))
        each = (Group(*(x[b] for x in groups)) for b in range(len(batch.prompts)))
        found += [best_hypotheses(row, settings.best) for row in each]
    return found


def _search_batch(decoder: Decoder, batch: Batch, settings: BeamSearchParams, ends: Sequence[int]) -> Group:
    rules = TracedParams(
        float(settings.diversity_penalty),
        float(settings.length_penalty),
        # One beam is greedy search, as in transformers: it ends with the first end.
        settings.early_stopping is True or settings.beams == 1,
        settings.early_stopping == "never",
        np.array(sorted(set(ends)), np.int32),
        len(batch.prompts[0]) - 1 if batch.sources else 0,
    )
    search, T = None, 0
    # Room grows as texts do: most end long before they may, and what is kept of them is moved at every token.
    while search is None or (T < batch.limit_B.max() and jax.device_get(search.groups.open).any()):
        T = min(GROWTH_FACTOR * T or INITIAL_CAPACITY, bucket(int(batch.limit_B.max()), INITIAL_CAPACITY))
        search = _prefill_state(decoder, batch, settings, T) if search is None else _grow(decoder, batch, search, T)
        search = run_search(decoder.model, decoder.params, search, batch.limit_B, rules)
    return search.groups


def _capacity(batch: Batch, T: int) -> int:
    # The last new token is never read. Prompts are of any length, but where there are sources they are all short.
    return capacity(batch, min(T, int(batch.limit_B.max())) - 1, INITIAL_CAPACITY if batch.sources else 64)


@partial(jax.jit, static_argnames=("groups", "width", "T"))
def _init_state(cache: Cache, last_B: jax.Array, limit_B: jax.Array, groups: int, width: int, T: int) -> SearchState:
    beams, start = groups * width, init_groups(limit_B, groups, width, T)
    return SearchState(jnp.zeros((), jnp.int32), caches.multiplied(cache, beams), jnp.repeat(last_B, beams), start)


def _prefill_state(decoder: Decoder, batch: Batch, settings: BeamSearchParams, T: int) -> SearchState:
    cache = prefill_batch(decoder, batch, _capacity(batch, T))
    width = settings.beams // settings.groups
    return _init_state(cache, batch.last_B, batch.limit_B, settings.groups, width, T)


def _grow(decoder: Decoder, batch: Batch, search: SearchState, T: int) -> SearchState:
    """The same search with room for T new tokens."""
    more = T - search.groups.ids_WT.shape[-1]

    def longer(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])

    groups = search.groups
    groups = groups._replace(**{name: longer(getattr(groups, name)) for name in Group._fields if name.endswith("_WT")})
    layers = jax.eval_shape(lambda: decoder.empty(len(search.token_N), _capacity(batch, T), 1)).layers
    cache = search.cache._replace(layers=caches.grown(search.cache.layers, layers))
    return search._replace(cache=cache, groups=groups)
