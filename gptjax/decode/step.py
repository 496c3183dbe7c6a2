"""Tokens on the device, many of them in one dispatch: a State in, a State and what was drawn out. Pure functions.

A row's newest token is in its history but not yet in the caches: each step reads it, and draws the next. So a prompt is
read but for its last token, and every new token comes from this one program.
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

MAX_STEPS = 64  # tokens of a row in one dispatch


class State(NamedTuple):
    """All rows of a batch, B of them, and what M speakers have read of each."""

    caches: tuple[Cache, ...]
    next_MB: jax.Array  # what each speaker reads next
    history: History
    keys_B: jax.Array  # a row's own random key
    batched: BatchedSamplingParams
    until_B: jax.Array  # how long the history may get
    active_B: jax.Array


class Drawn(NamedTuple):
    """What a dispatch of n steps drew; rows that were not active before a step have nothing there."""

    ids_nB: jax.Array
    logprobs_nB: jax.Array  # nats, in the speakers' own distribution, before any processing
    likeliest_nBm: jax.Array  # the m likeliest ids
    likeliest_logprobs_nBm: jax.Array
    active_nB: jax.Array


class Program(NamedTuple):
    """What a program is compiled for: static."""

    models: tuple[nn.Module, ...]
    combine: str
    used: frozenset[str]  # of gptjax.decode.settings.used
    ends: tuple[int, ...]  # ids after which a text is over
    room: int  # how many tokens a cache may hold; 0: any number, old ones make room
    alternatives: int  # m
    watermark: Watermark | None


def sample_next(program: Program, state: State, logits_BV: jax.Array, allowed_BW: jax.Array | None) -> jax.Array:
    """The next id of each row, from the speakers' logits."""
    history = state.history
    if allowed_BW is not None:
        logits_BV = apply_bitmask(logits_BV, allowed_BW)
    if program.watermark:
        back_w = jnp.arange(program.watermark.width, 0, -1)
        places_Bw = jnp.maximum(history.length_B[:, None] - back_w, 0)
        logits_BV = apply_watermark(logits_BV, jnp.take_along_axis(history.ids_BS, places_Bw, 1), program.watermark)
    logits_BV = sampling.process_logits(logits_BV, state.batched, history, program.used, program.ends)
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, history.length_B - history.prompt_B)
    return sampling.sample(logits_BV, keys_B, state.batched.temperature_B, program.used)


def forward(
    program: Program, params: tuple[Any, ...], weight_M: jax.Array, state: State
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """The speakers' logits for the next token of each row, [B, V], and their caches with what they read for it."""
    logits, extended = [], []
    for model, of_model, ids_B, cache in zip(program.models, params, state.next_MB, state.caches, strict=True):
        x_B1D, table_VD, now = models.extend(model, of_model, ids_B[:, None], cache)
        logits.append(models.next_logits(model, x_B1D[:, 0], table_VD))
        # A row that is over reads in place, so that it needs no program of its own, and gets no longer.
        extended.append(now._replace(length_B=jnp.where(state.active_B, now.length_B, cache.length_B)))
    return combine_logits(logits, program.combine, weight_M), tuple(extended)


def decode_step(
    program: Program, params: tuple[Any, ...], weight_M: jax.Array, state: State, allowed_BW: jax.Array | None
) -> tuple[State, Drawn]:
    """Every active row with one more token; what was drawn has no axis n."""
    logits_BV, extended = forward(program, params, weight_M, state)
    ids_B, active_B, history = sample_next(program, state, logits_BV, allowed_BW), state.active_B, state.history
    B, S = history.ids_BS.shape
    place_B = jnp.where(active_B, history.length_B, S)
    ids_BS = history.ids_BS.at[jnp.arange(B), place_B].set(ids_B, mode="drop")
    history = history._replace(ids_BS=ids_BS, length_B=history.length_B + active_B)
    drawn = Drawn(
        ids_B,
        sampling.logprobs(logits_BV, ids_B),
        *sampling.alternatives(logits_BV, program.alternatives),
        active_B,
    )
    goes_on_B = active_B & (history.length_B < state.until_B) & ~jnp.isin(ids_B, jnp.array(program.ends, jnp.int32))
    if program.room:
        for cache in extended:
            goes_on_B &= cache.length_B < program.room
    next_MB = jnp.where(active_B, ids_B, state.next_MB)
    return State(extended, next_MB, history, state.keys_B, state.batched, state.until_B, goes_on_B), drawn


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_steps(
    program: Program,
    params: tuple[Any, ...],
    weight_M: jax.Array,
    state: State,
    steps: jax.Array,
    allowed_BW: jax.Array | None = None,
) -> tuple[State, Drawn]:
    """Up to `steps` tokens for each row, at most MOST; it ends before where no row is active.

    Args:
      program: static.
      params, weight_M: of the speakers.
      state: given up.
      steps: how many; 1 where `allowed_BW` is given.
      allowed_BW: which ids may come next, as of gptjax.decode.constraints.
    """
    one = partial(decode_step, program, params, weight_M, allowed_BW=allowed_BW)
    shapes = jax.eval_shape(lambda state: one(state)[1], state)
    nothing = jax.tree.map(lambda shape: jnp.zeros((MAX_STEPS, *shape.shape), shape.dtype), shapes)

    def more(carry: tuple[jax.Array, State, Drawn]) -> jax.Array:
        n, state, _ = carry
        return (n < steps) & jnp.any(state.active_B)

    def body(carry: tuple[jax.Array, State, Drawn]) -> tuple[jax.Array, State, Drawn]:
        n, state, drawn = carry
        state, now = one(state)
        return n + 1, state, jax.tree.map(lambda all_n, one: all_n.at[n].set(one), drawn, now)

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state, nothing))[1:]
