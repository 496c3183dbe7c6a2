"""Speculative decoding: tokens are drafted cheaply, and the model verifies all of them in one forward pass.

The text follows the model's processed distribution exactly, whatever drafts: a smaller model, or the row's own history.
Pure functions on the device.

Axes besides those of gptjax.models: k proposals per round, T = k + 1 positions that the model verifies, N maximum
number of tokens in a call.
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

MAX_ROUNDS = 16  # in a call


class State(NamedTuple):
    """State of the rows of a batch.

    Attributes:
      history: the newest id of each row is not in the caches yet. S is the maximum number of ids in a row.
      target: cache of all ids of an active row but the newest; capacity at least S.
      draft: None for n-gram lookup; else cache of all ids of an active row but the newest one or two.
      active_B: rows to continue; the others are unchanged, and may hold anything.
      budget_B: int32; remaining number of new tokens of a row.
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
      length_B: number of new tokens.
      proposed_B: number of tokens proposed and verified.
      accepted_B: number of proposed tokens among the new ones.
      rounds_B: number of forward passes of the model.
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
    """Runs some rounds, each of which adds 1 to k + 1 tokens to every active row; stops when no row is active.

    A row ends, and is no longer active, with an id of `ends`, with its budget, or with S ids. Rows are independent. The
    n-th token of a row is sampled with the key fold_in(key, n), so with n-gram lookup, or at temperature 0, the text
    equals that of plain decoding with the same keys.

    Args:
      plan: static.
      rounds: maximum number of rounds, at most MAX_ROUNDS.
      params, draft_params: of `plan.target` and `plan.draft`.
      keys_B: a jax.random key for each row.
      batched: sampling parameters of each row.
      state: donated.
    """
    B, N = len(keys_B), MAX_ROUNDS * (plan.speculation.tokens + 1)
    zeros_B = jnp.zeros(B, jnp.int32)
    emitted = Emitted(jnp.zeros((B, N), jnp.int32), jnp.zeros((B, N), jnp.float32), *[zeros_B] * 4)

    def cond(carry: tuple[State, Emitted]) -> jax.Array:
        state, emitted = carry
        return jnp.any(state.active_B) & (jnp.max(emitted.rounds_B) < jnp.minimum(rounds, MAX_ROUNDS))

    def body(carry: tuple[State, Emitted]) -> tuple[State, Emitted]:
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
    return jax.lax.while_loop(cond, body, (state, emitted))


def run_round(
    plan: DraftPlan, params: Any, draft_params: Any, keys_B: jax.Array, batched: BatchedSamplingParams, state: State
) -> tuple[State, Emitted]:
    """Runs a round of every active row, each with room for a token; arguments as for `run_rounds`, N = T."""
    k, history, active_B = plan.speculation.tokens, state.history, state.active_B
    limit_B = jnp.where(active_B, jnp.minimum(_remaining(state) - 1, k), 0)
    draft = state.draft
    if draft is None:
        proposals = prompt_lookup(plan.speculation, history, limit_B)
    else:
        proposals, draft = draft_proposals(plan, draft_params, keys_B, batched, history, draft, limit_B)
    logits_BTV, target = _target_logits(plan, params, history, state.target, proposals)
    processed_BTV = _process_positions(plan, logits_BTV, batched, history, proposals)
    is_deterministic = proposals.logits_BkV is None or "sampling" not in plan.used
    verify = accept_matching if is_deterministic else rejection_sample
    accepted_B, next_B = verify(plan, keys_B, batched, token_numbers(history, k + 1), proposals, processed_BTV)

    positions_T = jnp.arange(k + 1)
    ids_BT = jnp.pad(proposals.ids_Bk, ((0, 0), (0, 1)))
    ids_BT = jnp.where(positions_T == accepted_B[:, None], next_B[:, None], ids_BT)
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
    logprobs_BT = _flat(logprobs, logits_BTV, ids_BT)
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
    """Accepts proposals as long as they equal the tokens that plain decoding samples.

    For deterministic proposals (q is 1 for one id) this is algorithm 1 of arXiv 2211.17192: an id is accepted with
    probability p(id), and the token that replaces it follows p without that id.

    Args:
      plan, keys_B, batched: as for `run_rounds`.
      numbers_BT: numbers of the tokens, 0 for a row's first new one.
      proposals: of this round.
      logits_BTV: of the model's processed distribution p at each of the T positions.

    Returns:
      Number of accepted proposals, and the token after them, int32 [B].
    """
    T = logits_BTV.shape[1]
    temperature_BT = jnp.repeat(batched.temperature_B[:, None], T, 1)
    sampled_BT = _flat(partial(sample, used=plan.used), logits_BTV, token_keys(keys_B, numbers_BT), temperature_BT)
    accepted_B = _leading_true(sampled_BT[:, :-1] == proposals.ids_Bk, proposals.length_B)
    return accepted_B, jnp.take_along_axis(sampled_BT, accepted_B[:, None], 1)[:, 0]


def rejection_sample(
    plan: DraftPlan,
    keys_B: jax.Array,
    batched: BatchedSamplingParams,
    numbers_BT: jax.Array,
    proposals: Proposals,
    logits_BTV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Accepts proposals sampled from q, each with probability min(1, p/q), by rejection sampling.

    The token after them is sampled from norm(max(0, p - q)) where a proposal was rejected, from p where all were
    accepted (arXiv 2211.17192 algorithm 1; arXiv 2302.01318 algorithm 2). Rows at temperature 0 accept the most likely
    token. Arguments and results as for `accept_matching`.
    """
    ids_Bk = proposals.ids_Bk
    q_logits_BkV: Any = proposals.logits_BkV
    k = ids_Bk.shape[1]
    accept_keys_Bk = token_keys(keys_B, numbers_BT[:, :k], ACCEPTING)
    uniform_Bk = jax.vmap(jax.vmap(jax.random.uniform))(accept_keys_Bk)
    p_Bk, q_Bk = (jnp.exp(_flat(logprobs, x_BkV, ids_Bk)) for x_BkV in (logits_BTV[:, :k], q_logits_BkV))
    accept_Bk = uniform_Bk * q_Bk < p_Bk
    greedy_B = batched.temperature_B == 0
    if "greedy" in plan.used:
        is_likeliest_Bk = _flat(greedy, logits_BTV[:, :k]) == ids_Bk
        accept_Bk = jnp.where(greedy_B[:, None], is_likeliest_Bk, accept_Bk)
    accepted_B = _leading_true(accept_Bk, proposals.length_B)

    def at(values_Bn: jax.Array, place_B: jax.Array) -> jax.Array:
        return jax.vmap(lambda values, place: values[place])(values_Bn, place_B)

    p_logits_BV = at(logits_BTV, accepted_B)
    q_logits_BV = at(q_logits_BkV, jnp.minimum(accepted_B, k - 1))
    residual_BV = jnp.maximum(jax.nn.softmax(p_logits_BV) - jax.nn.softmax(q_logits_BV), 0)
    rejected_B = (accepted_B < proposals.length_B) & ~greedy_B & jnp.any(residual_BV > 0, 1)
    logits_BV = jnp.where(rejected_B[:, None], jnp.log(residual_BV), p_logits_BV)
    keys_B = token_keys(keys_B, at(numbers_BT, accepted_B)[:, None])[:, 0]
    return accepted_B, sample(logits_BV, keys_B, batched.temperature_B, plan.used)


def _target_logits(
    plan: DraftPlan, params: Any, history: History, cache: Cache, proposals: Proposals
) -> tuple[jax.Array, Cache]:
    """Returns the model's logits_BTV after the newest id and after each proposal, and its cache with all of them."""
    newest_B1 = jnp.take_along_axis(history.ids_BS, jnp.maximum(history.length_B - 1, 0)[:, None], 1)
    ids_BT = jnp.concatenate([newest_B1, proposals.ids_Bk], 1)
    x_BTD, unembedding_VD, cache = models.extend(plan.target, params, ids_BT, cache, proposals.length_B + 1)
    return models.next_logits(plan.target, x_BTD, unembedding_VD), cache


def _process_positions(
    plan: DraftPlan, logits_BTV: jax.Array, batched: BatchedSamplingParams, history: History, proposals: Proposals
) -> jax.Array:
    """Processes the logits at each position with a history that includes the proposals before it."""
    B, T, V = logits_BTV.shape
    lengths_BT = history.length_B[:, None] + jnp.arange(T)
    history = append(history, proposals.ids_Bk, proposals.length_B)
    each: Any = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), (batched, history))
    history = each[1]._replace(length_B=lengths_BT.reshape(-1))
    return process_logits(logits_BTV.reshape(B * T, V), each[0], history, plan.used, plan.ends).reshape(B, T, V)


def _flat(f: Any, *values: jax.Array) -> jax.Array:
    """Applies f to values [B, n, ...] reshaped to [B * n, ...]; returns [B, n]."""
    B, n = values[0].shape[:2]
    flat: jax.Array = f(*(x.reshape(B * n, *x.shape[2:]) for x in values))
    return flat.reshape(B, n)


def _remaining(state: State) -> jax.Array:
    """Returns the remaining number of new tokens of each row."""
    return jnp.minimum(state.budget_B, state.history.ids_BS.shape[1] - state.history.length_B)


def _leading_true(yes_Bk: jax.Array, length_B: jax.Array) -> jax.Array:
    """Returns the number of leading true values among the first `length` of each row."""
    within_Bk = jnp.arange(yes_Bk.shape[1]) < length_B[:, None]
    return jnp.sum(jnp.cumprod((yes_Bk & within_Bk).astype(jnp.int32), 1), 1)


def _cut_at_end(ids_BT: jax.Array, length_B: jax.Array, ends: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the number of ids up to the first that ends a text, at most `length`, and True where there is one."""
    T = ids_BT.shape[1]
    positions_T = jnp.arange(T)
    is_end_BT = jnp.isin(ids_BT, jnp.array(ends, jnp.int32)) & (positions_T < length_B[:, None])
    first_B = jnp.min(jnp.where(is_end_BT, positions_T, T), 1)
    return jnp.minimum(length_B, first_B + 1), first_B < T
