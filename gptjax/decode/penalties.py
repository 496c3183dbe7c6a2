"""Logit biases, penalties for earlier tokens, and the minimum length. Pure functions of logits and history.

Each takes logits_BV float32 and one value per row, and has a value that means "off". Rows are independent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.decode.settings import DROPPED_ID


class History(NamedTuple):
    """Token ids of each row.

    Attributes:
      ids_BS: int32, prompt then new tokens from column 0; ids beyond the length are ignored.
      length_B: number of ids in each row.
      prompt_B: number of those that are the prompt.
    """

    ids_BS: jax.Array
    length_B: jax.Array
    prompt_B: jax.Array


def _positions(history: History) -> jax.Array:
    return jnp.arange(history.ids_BS.shape[1])[None]


def _is_token(history: History) -> jax.Array:
    """bool [B, S]: True for tokens of the prompt or the continuation."""
    return _positions(history) < history.length_B[:, None]


def _rows(ids_BS: jax.Array) -> jax.Array:
    return jnp.arange(len(ids_BS))[:, None]


def apply_logit_bias(logits_BV: jax.Array, ids_Bn: jax.Array, bias_Bn: jax.Array) -> jax.Array:
    """Adds nats to the logits of some ids of each row; an id beyond the vocabulary is padding."""
    return logits_BV.at[_rows(ids_Bn), ids_Bn].add(bias_Bn, mode="drop")


def apply_repetition_penalty(logits_BV: jax.Array, history: History, penalty_B: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of each id in prompt or continuation (arXiv 1909.05858); 1: off.

    The paper divides whatever the sign, which favours ids with negative logits; transformers does the same as here.
    """
    ids_BS = jnp.where(_is_token(history), history.ids_BS, DROPPED_ID)
    seen_BS = jnp.take_along_axis(logits_BV, ids_BS, 1, mode="clip")
    penalty_B1 = penalty_B[:, None]
    seen_BS = jnp.where(seen_BS < 0, seen_BS * penalty_B1, seen_BS / penalty_B1)
    return logits_BV.at[_rows(ids_BS), ids_BS].set(seen_BS, mode="drop")


def apply_frequency_and_presence(
    logits_BV: jax.Array, history: History, frequency_B: jax.Array, presence_B: jax.Array
) -> jax.Array:
    """Subtracts `frequency * count + presence * (count > 0)`, with counts among the new tokens; 0 and 0: off.

    OpenAI's definition (API reference, "Frequency and presence penalties").
    """
    new_BS = _is_token(history) & (_positions(history) >= history.prompt_B[:, None])
    ids_BS = jnp.where(new_BS, history.ids_BS, DROPPED_ID)
    counts_BV = jnp.zeros(logits_BV.shape, jnp.float32).at[_rows(ids_BS), ids_BS].add(1, mode="drop")
    return logits_BV - frequency_B[:, None] * counts_BV - presence_B[:, None] * (counts_BV > 0)


def ban_repeated_ngrams(logits_BV: jax.Array, history: History, n_B: jax.Array) -> jax.Array:
    """Bans each id that would complete an n-gram that prompt or continuation already has; 0: off, 1: every id seen.

    An id at position s is banned where the n - 1 ids before it are the last n - 1 of the row.
    """
    ids_BS, length_B = history.ids_BS, history.length_B
    follows_BS = _is_token(history) & (_positions(history) >= n_B[:, None] - 1) & (n_B[:, None] > 0)

    def narrow(back: jax.Array, follows_BS: jax.Array) -> jax.Array:
        last_B1 = jnp.take_along_axis(ids_BS, jnp.maximum(length_B - back, 0)[:, None], 1)
        return follows_BS & ((jnp.roll(ids_BS, back, 1) == last_B1) | (back >= n_B[:, None]))

    follows_BS = jax.lax.fori_loop(1, jnp.max(n_B), narrow, follows_BS)
    ids_BS = jnp.where(follows_BS, ids_BS, DROPPED_ID)
    return logits_BV.at[_rows(ids_BS), ids_BS].set(-jnp.inf, mode="drop")


def apply_min_tokens(
    logits_BV: jax.Array, history: History, min_tokens_B: jax.Array, ends: tuple[int, ...]
) -> jax.Array:
    """Bans the ids that end a text until a row has `min_tokens` new tokens; 0: off.

    Args:
      logits_BV: logits.
      history: of each row.
      min_tokens_B: minimum number of new tokens.
      ends: ids that end a text; static.
    """
    early_B = history.length_B - history.prompt_B < min_tokens_B
    for end in ends:
        logits_BV = logits_BV.at[:, end].set(jnp.where(early_B, -jnp.inf, logits_BV[:, end]))
    return logits_BV
