"""Prompts of different lengths side by side in one cache, for what searches a whole batch at once.

Sizes are rounded up to few, so that other prompts seldom compile a program. No token is chosen here.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import ConfigError, DataError
from gptjax.decode import prefill
from gptjax.decode.prefill import Decoder, bucket
from gptjax.models import cache as caches
from gptjax.models.cache import Cache


class Batch(NamedTuple):
    """Some of the prompts, and rows that stand for none, so that batches are of few sizes."""

    prompts: list[Sequence[int]]
    last_B: np.ndarray  # int32, the last token of each
    limit_B: np.ndarray  # int32, the most new tokens of each; 0 for a row that stands for none
    sources: list[Sequence[int]]  # of an encoder-decoder, what its encoder reads for each; else empty

    @property
    def rows(self) -> int:
        """B."""
        return len(self.last_B)


def token_limits(prompts: Sequence[Sequence[int]], max_tokens: int, room: int) -> list[int]:
    """How many new tokens each prompt may get.

    Args:
      prompts: ids of each.
      max_tokens: the most that is asked for.
      room: how many tokens a prompt and what follows may have together.

    Raises:
      ConfigError, DataError: no new tokens are asked for, or a prompt is empty or leaves no room.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
    for i, ids in enumerate(prompts):
        if not ids:
            raise DataError(f"prompt {i + 1} has no tokens; give it some text")
        if len(ids) >= room:
            raise DataError(f"prompt {i + 1} has {len(ids)} tokens; the model's context leaves room for {room - 1}")
    return [min(max_tokens, room - len(ids)) for ids in prompts]


def batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int, sources: Sequence[Sequence[int]] = ()
) -> Iterator[Batch]:
    """The prompts in order, at most `batch_size` at once; with fewer, a batch has the next power of two rows."""
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        last_B, limit_B = np.zeros((2, min(batch_size, bucket(len(some), 1))), np.int32)
        last_B[: len(some)] = [ids[-1] for ids in some]
        limit_B[: len(some)] = limits[start : start + batch_size]
        yield Batch(some, last_B, limit_B, list(sources[start : start + batch_size]))


def capacity(batch: Batch, new_tokens: int, least: int = 64) -> int:
    """How many tokens a row must hold: the longest prompt's and so many new ones, rounded up; see `bucket`."""
    return bucket(max(map(len, batch.prompts)) + new_tokens, least)


def init_cache(decoder: Decoder, batch: Batch, C: int) -> Cache:
    """A cache of B rows that has read nothing, but heard their sources, all together."""
    cache = decoder.empty(batch.rows, C, 1)
    return prefill.encode_source(decoder, batch.sources, cache) if batch.sources else cache


def init_row_cache(decoder: Decoder, cache: Cache, row: int, C: int) -> Cache:
    """A cache of a single row that has heard what this row of another one has."""
    heard = jax.tree.map(lambda x: x[row : row + 1], cache.heard)
    return decoder.empty(1, C, prefill.max_chunk())._replace(heard=heard)


@partial(jax.jit, donate_argnums=0)
def put_row(cache: Cache, row: jax.Array, single: Cache) -> Cache:
    """As gptjax.models.cache.put, compiled; the old cache is used up."""
    return caches.put(cache, row, single)


def prefill_batch(decoder: Decoder, batch: Batch, C: int) -> Cache:
    """A cache of B rows, with room for C tokens each, that have read all of their prompts but the last token."""
    cache = init_cache(decoder, batch, C)
    for row, ids in enumerate(batch.prompts):
        if len(ids) > 1:
            single = prefill.prefill(decoder, ids[:-1], init_row_cache(decoder, cache, row, C))
            cache = put_row(cache, jnp.asarray(row), single._replace(heard=None))
    return cache
