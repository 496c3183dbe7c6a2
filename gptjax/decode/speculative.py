"""Speculative decoding: something cheap proposes tokens, the model reads them all at once and keeps what it would say.

The text follows the model's own processed distribution exactly, whatever proposes: a smaller model, or the row's own
history. Pure functions on the device; nothing here reads prompts, knows text or has a loop on the host.

Axes besides those of gptjax.models: k proposals of a round, T = k + 1 positions that the model judges, N the most
tokens of a call.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import models
from gptjax.decode.drafting import (
    ACCEPTING,
    DraftPlan,
    Proposals,
    append,
    draft_proposals,
    prompt_lookup,
    put_at,
    token_keys,
    token_numbers,
)
from gptjax.decode.penalties import History
from gptjax.decode.sampling import greedy, logprobs, process_logits, sample
from gptjax.decode.settings import BatchedSamplingParams
from gptjax.models.cache import Cache

MAX_ROUNDS = 16  # of a call, at most


class State(NamedTuple):
    """Rows on their way.

    Attributes:
      history: the newest id of each row is not in the caches yet. S is the most ids that a row may have.
      target: has read all of an active row but its newest id; capacity at least S.
      draft: None for n-gram lookup; else has read all of an active row but its newest one or two ids.
      active_B: rows to go on with; the others stay as they are, and may hold anything.
      budget_B: int32; how many more tokens a row wants.
    """

    history: History
    target: Cache
    draft: Cache | None
    active_B: jax.Array
    budget_B: jax.Array


class Emitted(NamedTuple):
    """New tokens of a call.

    Attributes:
      ids_BN: int32; a row's new ids in order, the one that ends its text included.
      logprobs_BN: float32, nats; in the model's own distribution, before processing.
      length_B: how many there are.
      proposed_B: how many tokens were proposed and judged.
      accepted_B: how many of those are among the new ones.
      rounds_B: how many times the model was asked.
    """

    ids_BN: jax.Array
    logprobs_BN: jax.Array
    length_B: jax.Array
    proposed_B: jax.Array
    accepted_B: jax.Array
    rounds_B: jax.Array


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def run_rounds(
    plan: DraftPlan,
    rounds: Any,
    params: Any,
    draft_params: Any,
    keys_B: jax.Array,
    batched: BatchedSamplingParams,
    state: State,
) -> tuple[State, Emitted]:
    """Rows some rounds further, each by 1 to k + 1 tokens a round, fewer where no row is active before.

    A row ends, and is no longer active, with an id of `ends`, with its budget, or with S ids. What it gets depends on
    no other row. The draws of its n-th token have the key fold_in(key, n), so with n-gram lookup, or at temperature
    0, the text is that of plain decoding with the same keys.

    Args:
      plan: static.
      rounds: at most so many, and at most ROUNDS.
      params, draft_params: of `plan.target` and `plan.draft`.
      keys_B: a jax.random key for each row.
      knobs: what each row asks for.
      state: is used up (its memory is taken for the new one).
    """
    B, N = len(keys_B), MAX_ROUNDS * (plan.speculation.tokens + 1)
    zeros_B = jnp.zeros(B, jnp.int32)
    emitted = Emitted(jnp.zeros((B, N), jnp.int32), jnp.zeros((B, N), jnp.float32), *[zeros_B] * 4)

    def goes_on(carry: tuple[State, Emitted]) -> jax.Array:
        state, emitted = carry
        return jnp.any(state.active_B) & (jnp.max(emitted.rounds_B) < jnp.minimum(rounds, MAX_ROUNDS))

    def further(carry: tuple[State, Emitted]) -> tuple[State, Emitted]:
        state, before = carry
        state, new = run_round(plan, params, draft_params, keys_B, batched, state)
        at, counts = before[2], before[3:]
        return state, Emitted(
            put_at(before.ids_BN, new.ids_BN, at, new.length_B),
            put_at(before.logprobs_BN, new.logprobs_BN, at, new.length_B),
            at + new.length_B,
            *(old_B + new_B for old_B, new_B in zip(counts, new[3:], strict=True)),
        )

    state = state._replace(active_B=state.active_B & (_remaining(state) > 0))
    return jax.lax.while_loop(goes_on, further, (state, emitted))


def run_round(
    plan: DraftPlan, params: Any, draft_params: Any, keys_B: jax.Array, batched: BatchedSamplingParams, state: State
) -> tuple[State, Emitted]:
    """A round of every active row, each of which has room; arguments as of `run_rounds`, N = T."""
    k, history, active_B = plan.speculation.tokens, state.history, state.active_B
    most_B = jnp.where(active_B, jnp.minimum(_remaining(state) - 1, k), 0)
    draft = state.draft
    if draft is None:
        proposals = prompt_lookup(plan.speculation, history, most_B)
    else:
        proposals, draft = draft_proposals(plan, draft_params, keys_B, batched, history, draft, most_B)
    own_BTV, target = _target_logits(plan, params, history, state.target, proposals)
    wanted_BTV = _process_positions(plan, own_BTV, batched, history, proposals)
    certain = proposals.logits_BkV is None or "sampling" not in plan.used
    judge = accept_matching if certain else rejection_sample
    accepted_B, next_B = judge(plan, keys_B, batched, token_numbers(history, k + 1), proposals, wanted_BTV)

    places_T = jnp.arange(k + 1)
    ids_BT = jnp.pad(proposals.ids_Bk, ((0, 0), (0, 1)))
    ids_BT = jnp.where(places_T == accepted_B[:, None], next_B[:, None], ids_BT)
    new_B, ended_B = _cut_at_end(ids_BT, accepted_B + 1, plan.ends)
    new_B = jnp.where(active_B, new_B, 0)

    after = append(history, ids_BT, new_B)
    read_B = jnp.where(active_B, after.length_B - 1, state.target.length_B)
    target = target._replace(length_B=read_B)
    if draft is not None and state.draft is not None:
        read_B = jnp.where(active_B, jnp.minimum(draft.length_B, after.length_B - 1), state.draft.length_B)
        draft = draft._replace(length_B=read_B)
    state = State(after, target, draft, active_B & ~ended_B, state.budget_B - new_B)
    state = state._replace(active_B=state.active_B & (_remaining(state) > 0))
    logprobs_BT = _flat(logprobs, own_BTV, ids_BT)
    accepted_B = jnp.minimum(accepted_B, new_B)
    return state, Emitted(ids_BT, logprobs_BT, new_B, proposals.length_B, accepted_B, active_B.astype(jnp.int32))


def accept_matching(
    plan: DraftPlan,
    keys_B: jax.Array,
    batched: BatchedSamplingParams,
    numbers_BT: jax.Array,
    proposals: Proposals,
    logits_BTV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How many proposals are what plain decoding draws there, and what it draws after those.

    For certain proposals (q is 1 for one id) that is algorithm 1 of arXiv 2211.17192: it accepts with probability
    p(id), and what it draws instead follows p without that id.

    Args:
      numbers_BT: of the tokens, 0 for a row's first new one.
      logits_BTV: of the model's processed distribution p at each of the T places.
      plan, keys_B, knobs: as of `run_rounds`.
      proposals: of this round.
    """
    T = logits_BTV.shape[1]
    temperature_BT = jnp.repeat(batched.temperature_B[:, None], T, 1)
    drawn_BT = _flat(partial(sample, used=plan.used), logits_BTV, token_keys(keys_B, numbers_BT), temperature_BT)
    accepted_B = _leading_true(drawn_BT[:, :-1] == proposals.ids_Bk, proposals.length_B)
    return accepted_B, jnp.take_along_axis(drawn_BT, accepted_B[:, None], 1)[:, 0]


def rejection_sample(
    plan: DraftPlan,
    keys_B: jax.Array,
    batched: BatchedSamplingParams,
    numbers_BT: jax.Array,
    proposals: Proposals,
    logits_BTV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How many proposals drawn from q are accepted, each with probability min(1, p/q), and the id after those.

    That one is drawn from norm(max(0, p - q)) where a proposal was refused, from p where none was left (arXiv
    2211.17192 algorithm 1; arXiv 2302.01318 algorithm 2). Rows at temperature 0 accept the likeliest. Arguments as of
    `drawn_alike`.
    """
    ids_Bk = proposals.ids_Bk
    q_logits_BkV: Any = proposals.logits_BkV
    k = ids_Bk.shape[1]
    accepting_Bk = token_keys(keys_B, numbers_BT[:, :k], ACCEPTING)
    uniform_Bk = jax.vmap(jax.vmap(jax.random.uniform))(accepting_Bk)
    p_Bk, q_Bk = (jnp.exp(_flat(logprobs, x_BkV, ids_Bk)) for x_BkV in (logits_BTV[:, :k], q_logits_BkV))
    kept_Bk = uniform_Bk * q_Bk < p_Bk
    greedy_B = batched.temperature_B == 0
    if "greedy" in plan.used:
        is_likeliest_Bk = _flat(greedy, logits_BTV[:, :k]) == ids_Bk
        kept_Bk = jnp.where(greedy_B[:, None], is_likeliest_Bk, kept_Bk)
    accepted_B = _leading_true(kept_Bk, proposals.length_B)

    def at(values_Bn: jax.Array, place_B: jax.Array) -> jax.Array:
        return jax.vmap(lambda values, place: values[place])(values_Bn, place_B)

    p_logits_BV = at(logits_BTV, accepted_B)
    q_logits_BV = at(q_logits_BkV, jnp.minimum(accepted_B, k - 1))
    rest_BV = jnp.maximum(jax.nn.softmax(p_logits_BV) - jax.nn.softmax(q_logits_BV), 0)
    refused_B = (accepted_B < proposals.length_B) & ~greedy_B & jnp.any(rest_BV > 0, 1)
    logits_BV = jnp.where(refused_B[:, None], jnp.log(rest_BV), p_logits_BV)
    keys_B = token_keys(keys_B, at(numbers_BT, accepted_B)[:, None])[:, 0]
    return accepted_B, sample(logits_BV, keys_B, batched.temperature_B, plan.used)


def _target_logits(
    plan: DraftPlan, params: Any, history: History, cache: Cache, proposals: Proposals
) -> tuple[jax.Array, Cache]:
    """The model's logits_BTV after the newest id and after each proposal, and its cache with all of them."""
    newest_B1 = jnp.take_along_axis(history.ids_BS, jnp.maximum(history.length_B - 1, 0)[:, None], 1)
    ids_BT = jnp.concatenate([newest_B1, proposals.ids_Bk], 1)
    x_BTD, table_VD, cache = models.extend(plan.target, params, ids_BT, cache, proposals.length_B + 1)
    return models.next_logits(plan.target, x_BTD, table_VD), cache


def _process_positions(
    plan: DraftPlan, logits_BTV: jax.Array, batched: BatchedSamplingParams, history: History, proposals: Proposals
) -> jax.Array:
    """Logits processed at each place with the history that has the proposals before it."""
    B, T, V = logits_BTV.shape
    lengths_BT = history.length_B[:, None] + jnp.arange(T)
    history = append(history, proposals.ids_Bk, proposals.length_B)
    each: Any = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), (batched, history))
    history = each[1]._replace(length_B=lengths_BT.reshape(-1))
    return process_logits(logits_BTV.reshape(B * T, V), each[0], history, plan.used, plan.ends).reshape(B, T, V)


def _flat(f: Any, *values: jax.Array) -> jax.Array:
    """f of values [B * n, ...], as if [B, n, ...] were rows of a batch."""
    B, n = values[0].shape[:2]
    flat: jax.Array = f(*(x.reshape(B * n, *x.shape[2:]) for x in values))
    return flat.reshape(B, n)


def _remaining(state: State) -> jax.Array:
    """How many more tokens each row may have."""
    return jnp.minimum(state.budget_B, state.history.ids_BS.shape[1] - state.history.length_B)


def _leading_true(yes_Bk: jax.Array, length_B: jax.Array) -> jax.Array:
    """How many of the first `length` are true before one is not."""
    within_Bk = jnp.arange(yes_Bk.shape[1]) < length_B[:, None]
    return jnp.sum(jnp.cumprod((yes_Bk & within_Bk).astype(jnp.int32), 1), 1)


def _cut_at_end(ids_BT: jax.Array, length_B: jax.Array, ends: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """How many of the first `length` ids come up to one that ends a text, it included, and whether there is one."""
    T = ids_BT.shape[1]
    places_T = jnp.arange(T)
    is_end_BT = jnp.isin(ids_BT, jnp.array(ends, jnp.int32)) & (places_T < length_B[:, None])
    first_B = jnp.min(jnp.where(is_end_BT, places_T, T), 1)
    return jnp.minimum(length_B, first_B + 1), first_B < T
