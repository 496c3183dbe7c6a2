"""Draft tokens for speculative decoding: from a draft model, or from a row's own history (prompt lookup).

Pure functions on the device; verification is in gptjax.decode.speculative.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode.penalties import History
from gptjax.decode.prefill import Decoder
from gptjax.decode.sampling import process_logits, sample
from gptjax.decode.settings import BatchedSamplingParams
from gptjax.models.cache import Cache

MAX_TOKENS = 64  # proposals per round, and ids that are looked up
# Constants folded into a token's key for independent samples; `sample` itself splits the key, which uses 0 and 1.
PROPOSING, ACCEPTING = 2, 3


class SpeculativeConfig(NamedTuple):
    """Configuration of the drafting of tokens.

    Attributes:
      tokens: number of proposals per round (k).
      ngram: maximum number of last ids that are looked up in a row's history; 0 with a draft model.
    """

    tokens: int = 4
    ngram: int = 0

    @property
    def lookahead(self) -> int:
        """Minimum `ahead` of the caches of model and draft model (gptjax.models.init_cache)."""
        return self.tokens + 1

    def check(self, has_draft: bool) -> None:
        """Raises ConfigError for values that are invalid with or without a draft model."""
        for name, least in (("tokens", 1), ("ngram", 0)):
            if not least <= getattr(self, name) <= MAX_TOKENS:
                raise ConfigError(f"{name} of speculation is {getattr(self, name)}; it must be {least} to {MAX_TOKENS}")
        if self.ngram and has_draft:
            raise ConfigError("a draft model and n-gram lookup cannot both propose tokens; leave out one of the two")
        if not self.ngram and not has_draft:
            raise ConfigError("nothing proposes tokens; give a draft model, or the n-gram length to look up, such as 3")


def check_draft(target: Decoder, draft: Decoder, tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    """Raises ConfigError unless draft model and model have the same vocabulary."""
    V, of_draft = target.model.config.vocabulary, draft.model.config.vocabulary
    if V != of_draft:
        raise ConfigError(f"the draft model has {of_draft} ids and the model {V}; they must share one vocabulary")
    if tokenizers.sha256(tokenizer) != tokenizers.sha256(draft_tokenizer):
        raise ConfigError("the draft model's tokenizer is not the model's; train both with the same one")


class DraftPlan(NamedTuple):
    """Static arguments of a compiled program.

    Attributes:
      target: the model, with unrolled layers.
      draft: the draft model; None for n-gram lookup.
      speculation: checked.
      used: gptjax.decode.settings.used of the rows.
      ends: ids that end a text.
    """

    target: nn.Module
    draft: nn.Module | None
    speculation: SpeculativeConfig
    used: frozenset[str]
    ends: tuple[int, ...] = ()


class Proposals(NamedTuple):
    """Proposals of one round; only the first `length` of a row are valid."""

    ids_Bk: jax.Array
    length_B: jax.Array
    logits_BkV: jax.Array | None  # of the distributions that they were sampled from; None: they are deterministic


def prompt_lookup(speculation: SpeculativeConfig, history: History, limit_B: jax.Array) -> Proposals:
    """Proposes what followed the newest earlier occurrence of a row's longest matching suffix of at most `ngram` ids.

    The occurrence may overlap the end, so that a repetition is continued (prompt lookup decoding,
    https://github.com/apoorvumang/prompt-lookup-decoding; arXiv 2304.04487).

    Args:
      speculation: its `ngram` and `tokens` are used.
      history: token ids of each row.
      limit_B: maximum number of proposals of each row.
    """
    ids_BS = history.ids_BS
    length_B1 = history.length_B[:, None]
    S = ids_BS.shape[1]
    positions_S = jnp.arange(S)
    same_BS = positions_S < length_B1  # the ids before this position equal the last ones of the row
    matched_BS = jnp.zeros(ids_BS.shape, jnp.int32)
    for back in range(1, speculation.ngram + 1):
        last_B1 = jnp.take_along_axis(ids_BS, jnp.maximum(length_B1 - back, 0), 1)
        same_BS &= (positions_S >= back) & (jnp.roll(ids_BS, back, 1) == last_B1)
        matched_BS += same_BS
    start_B1 = jnp.argmax(matched_BS * S + positions_S, 1)[:, None]
    is_match_B = jnp.max(matched_BS, 1) > 0
    positions_Bk = start_B1 + jnp.arange(speculation.tokens) % jnp.maximum(length_B1 - start_B1, 1)
    ids_Bk = jnp.take_along_axis(ids_BS, positions_Bk, 1, mode="clip")
    return Proposals(ids_Bk, jnp.where(is_match_B, limit_B, 0), None)


def draft_proposals(
    plan: DraftPlan,
    params: Any,
    keys_B: jax.Array,
    batched: BatchedSamplingParams,
    history: History,
    cache: Cache,
    limit_B: jax.Array,
) -> tuple[Proposals, Cache]:
    """Samples proposals from the draft model, with logits processed like the model's.

    Args:
      plan: static.
      params: of the draft model.
      keys_B: a jax.random key for each row.
      batched: sampling parameters of each row.
      history: token ids of each row.
      cache: of the draft model.
      limit_B: maximum number of proposals of each row; no more are written to the cache.

    Returns:
      Proposals, and the cache with all of them.
    """
    model: Any = plan.draft

    def propose(
        x_BD: jax.Array, unembedding_VD: jax.Array, history: History, n: Any
    ) -> tuple[History, tuple[Any, Any]]:
        logits_BV = models.next_logits(model, x_BD, unembedding_VD)
        logits_BV = process_logits(logits_BV, batched, history, plan.used, plan.ends)
        proposal_keys_B = token_keys(keys_B, token_numbers(history, 1), PROPOSING)[:, 0]
        ids_B = sample(logits_BV, proposal_keys_B, batched.temperature_B, plan.used)
        history = append(history, ids_B[:, None], (n < limit_B).astype(jnp.int32))
        return history, (ids_B, logits_BV if "sampling" in plan.used else None)

    # A row whose proposals were all accepted has two ids that the draft model has not read.
    behind_B = jnp.clip(history.length_B - cache.length_B, 1, 2)
    positions_B2 = cache.length_B[:, None] + jnp.arange(2)
    ids_B2 = jnp.take_along_axis(history.ids_BS, positions_B2, 1, mode="clip")
    x_B2D, unembedding_VD, cache = models.extend(model, params, ids_B2, cache, behind_B)
    x_BD = jnp.take_along_axis(x_B2D, (behind_B - 1)[:, None, None], 1)[:, 0]
    history, first = propose(x_BD, unembedding_VD, history, 0)

    def step(carry: tuple[Cache, History, jax.Array], n: jax.Array) -> tuple[Any, Any]:
        cache, history, ids_B = carry
        x_B1D, unembedding_VD, cache = models.extend(
            model, params, ids_B[:, None], cache, (n < limit_B).astype(jnp.int32)
        )
        history, proposal = propose(x_B1D[:, 0], unembedding_VD, history, n)
        return (cache, history, proposal[0]), proposal

    (cache, _, _), rest = jax.lax.scan(step, (cache, history, first[0]), jnp.arange(1, plan.speculation.tokens))
    ids_Bk, logits_BkV = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]).swapaxes(0, 1), first, rest)
    return Proposals(ids_Bk, limit_B, logits_BkV), cache


def token_numbers(history: History, n: int) -> jax.Array:
    """Returns the numbers of each row's next n tokens, 0 for its first new one: [B, n]."""
    return (history.length_B - history.prompt_B)[:, None] + jnp.arange(n)


def token_keys(keys_B: jax.Array, numbers_Bn: jax.Array, purpose: int | None = None) -> jax.Array:
    """Returns keys [B, n] of tokens by their numbers, for sampling them or for another purpose."""

    def token_key(key: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, number)
        return key if purpose is None else jax.random.fold_in(key, purpose)

    return jax.vmap(jax.vmap(token_key, (None, 0)))(keys_B, numbers_Bn)


def append(history: History, ids_BT: jax.Array, length_B: jax.Array) -> History:
    """Appends the first `length` ids of each row to the history."""
    ids_BS = put_at(history.ids_BS, ids_BT, history.length_B, length_B)
    return history._replace(ids_BS=ids_BS, length_B=history.length_B + length_B)


def put_at(values_BS: jax.Array, new_BT: jax.Array, at_B: jax.Array, length_B: jax.Array) -> jax.Array:
    """Writes the first `length` new values of each row from position `at` on."""
    B, S = values_BS.shape
    positions_T = jnp.arange(new_BT.shape[1])
    positions_BT = jnp.where(positions_T < length_B[:, None], at_B[:, None] + positions_T, S)
    return values_BS.at[jnp.arange(B)[:, None], positions_BT].set(new_BT, mode="drop")
