"""Decode steps on the device, many in one dispatch: from a State to a State and the sampled tokens. Pure functions.

A row's newest token is in its history but not yet in the caches: each step reads it, and samples the next. So prefill
leaves out the last token of a prompt, and every new token comes from this one program.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.decode import sampling
from gptjax.decode.constraints import apply_bitmask
from gptjax.decode.ensemble import combine_logits
from gptjax.decode.penalties import History
from gptjax.decode.settings import BatchedSamplingParams
from gptjax.decode.watermark import Watermark, apply_watermark
from gptjax.models.cache import Cache

MAX_STEPS = 64  # in one dispatch


class State(NamedTuple):
    """State of a batch of B rows, with the caches of M models."""

    caches: tuple[Cache, ...]
    next_MB: jax.Array  # the next input token of each model
    history: History
    keys_B: jax.Array  # a row's own random key
    batched: BatchedSamplingParams
    until_B: jax.Array  # maximum length of the history
    active_B: jax.Array


class StepOutput(NamedTuple):
    """Tokens sampled in a dispatch of n steps; invalid for rows that were not active before a step."""

    ids_nB: jax.Array
    logprobs_nB: jax.Array  # nats, in the models' distribution, before any processing
    top_ids_nBm: jax.Array  # the m most likely ids
    top_logprobs_nBm: jax.Array
    active_nB: jax.Array


class Program(NamedTuple):
    """Static arguments of a compiled program."""

    models: tuple[nn.Module, ...]
    combine: str
    used: frozenset[str]  # of gptjax.decode.settings.used
    ends: tuple[int, ...]  # ids after which a text is over
    max_cache_length: int  # maximum number of tokens in a cache; 0: no maximum, new ones overwrite the oldest
    alternatives: int  # m
    watermark: Watermark | None


def sample_next(program: Program, state: State, logits_BV: jax.Array, allowed_BW: jax.Array | None) -> jax.Array:
    """Samples the next id of each row from the models' combined logits."""
    history = state.history
    if allowed_BW is not None:
        logits_BV = apply_bitmask(logits_BV, allowed_BW)
    if program.watermark:
        back_w = jnp.arange(program.watermark.width, 0, -1)
        positions_Bw = jnp.maximum(history.length_B[:, None] - back_w, 0)
        logits_BV = apply_watermark(logits_BV, jnp.take_along_axis(history.ids_BS, positions_Bw, 1), program.watermark)
    logits_BV = sampling.process_logits(logits_BV, state.batched, history, program.used, program.ends)
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, history.length_B - history.prompt_B)
    return sampling.sample(logits_BV, keys_B, state.batched.temperature_B, program.used)


def forward(
    program: Program, params: tuple[Any, ...], weight_M: jax.Array, state: State
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs the models on the newest token of each row; returns combined logits [B, V] and their extended caches."""
    logits, extended = [], []
    for model, of_model, ids_B, cache in zip(program.models, params, state.next_MB, state.caches, strict=True):
        x_B1D, unembedding_VD, now = models.extend(model, of_model, ids_B[:, None], cache)
        logits.append(models.next_logits(model, x_B1D[:, 0], unembedding_VD))
        # The length of an inactive row stays the same: it overwrites the same position.
        extended.append(now._replace(length_B=jnp.where(state.active_B, now.length_B, cache.length_B)))
    return combine_logits(logits, program.combine, weight_M), tuple(extended)


def decode_step(
    program: Program, params: tuple[Any, ...], weight_M: jax.Array, state: State, allowed_BW: jax.Array | None
) -> tuple[State, StepOutput]:
    """Adds a token to every active row; the result has no axis n."""
    logits_BV, extended = forward(program, params, weight_M, state)
    ids_B, active_B, history = sample_next(program, state, logits_BV, allowed_BW), state.active_B, state.history
    B, S = history.ids_BS.shape
    place_B = jnp.where(active_B, history.length_B, S)
    ids_BS = history.ids_BS.at[jnp.arange(B), place_B].set(ids_B, mode="drop")
    history = history._replace(ids_BS=ids_BS, length_B=history.length_B + active_B)
    output = StepOutput(
        ids_B,
        sampling.logprobs(logits_BV, ids_B),
        *sampling.alternatives(logits_BV, program.alternatives),
        active_B,
    )
    is_active_B = active_B & (history.length_B < state.until_B) & ~jnp.isin(ids_B, jnp.array(program.ends, jnp.int32))
    if program.max_cache_length:
        for cache in extended:
            is_active_B &= cache.length_B < program.max_cache_length
    next_MB = jnp.where(active_B, ids_B, state.next_MB)
    return State(extended, next_MB, history, state.keys_B, state.batched, state.until_B, is_active_B), output


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_steps(
    program: Program,
    params: tuple[Any, ...],
    weight_M: jax.Array,
    state: State,
    steps: jax.Array,
    allowed_BW: jax.Array | None = None,
) -> tuple[State, StepOutput]:
    """Adds up to `steps` tokens to each row; stops when no row is active.

    Args:
      program: static.
      params, weight_M: parameters and weights of the models.
      state: donated.
      steps: number of steps, at most MAX_STEPS; 1 where `allowed_BW` is given.
      allowed_BW: bitmask of the ids that may come next (gptjax.decode.constraints).
    """
    one = partial(decode_step, program, params, weight_M, allowed_BW=allowed_BW)
    shapes = jax.eval_shape(lambda state: one(state)[1], state)
    nothing = jax.tree.map(lambda shape: jnp.zeros((MAX_STEPS, *shape.shape), shape.dtype), shapes)

    def cond(carry: tuple[jax.Array, State, StepOutput]) -> jax.Array:
        n, state, _ = carry
        return (n < steps) & jnp.any(state.active_B)

    def body(carry: tuple[jax.Array, State, StepOutput]) -> tuple[jax.Array, State, StepOutput]:
        n, state, output = carry
        state, now = one(state)
        return n + 1, state, jax.tree.map(lambda all_n, one: all_n.at[n].set(one), output, now)

    return jax.lax.while_loop(cond, body, (jnp.zeros((), jnp.int32), state, nothing))[1:]
