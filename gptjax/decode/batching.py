"""Batches of prompts of different lengths in one cache, for beam and contrastive search.

Sizes are rounded up to a few values, so that new prompts seldom compile a program. No token is chosen here.
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
    """Some of the prompts, padded with empty rows so that batches have few sizes."""

    prompts: list[Sequence[int]]
    last_B: np.ndarray  # int32, the last token of each
    limit_B: np.ndarray  # int32, maximum number of new tokens of each; 0 for an empty row
    sources: list[Sequence[int]]  # ids of each source, for an encoder-decoder; else empty

    @property
    def rows(self) -> int:
        """Number of rows, B."""
        return len(self.last_B)


def token_limits(prompts: Sequence[Sequence[int]], max_tokens: int, max_length: int) -> list[int]:
    """Returns the maximum number of new tokens for each prompt.

    Args:
      prompts: ids of each prompt.
      max_tokens: maximum number of new tokens requested.
      max_length: maximum number of tokens in a prompt and its continuation together.

    Raises:
      ConfigError: `max_tokens` is less than 1.
      DataError: a prompt is empty, or leaves no room for a new token.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
    for i, ids in enumerate(prompts):
        if not ids:
            raise DataError(f"prompt {i + 1} has no tokens; give it some text")
        if len(ids) >= max_length:
            raise DataError(
                f"prompt {i + 1} has {len(ids)} tokens; the model's context leaves room for {max_length - 1}"
            )
    return [min(max_tokens, max_length - len(ids)) for ids in prompts]


def batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int, sources: Sequence[Sequence[int]] = ()
) -> Iterator[Batch]:
    """Yields the prompts in order, `batch_size` at a time; a smaller batch has the next power of two rows."""
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        last_B, limit_B = np.zeros((2, min(batch_size, bucket(len(batch), 1))), np.int32)
        last_B[: len(batch)] = [ids[-1] for ids in batch]
        limit_B[: len(batch)] = limits[start : start + batch_size]
        yield Batch(batch, last_B, limit_B, list(sources[start : start + batch_size]))


def capacity(batch: Batch, new_tokens: int, least: int = 64) -> int:
    """Returns the cache capacity for the longest prompt and `new_tokens` more, rounded up; see `bucket`."""
    return bucket(max(map(len, batch.prompts)) + new_tokens, least)


def init_batch_cache(decoder: Decoder, batch: Batch, C: int) -> Cache:
    """Returns an empty cache of B rows, with the encoded sources of an encoder-decoder."""
    cache = decoder.empty(batch.rows, C, 1)
    return prefill.encode_source(decoder, batch.sources, cache) if batch.sources else cache


def init_row_cache(decoder: Decoder, cache: Cache, row: int, C: int) -> Cache:
    """Returns an empty cache of a single row, with the encoded source of that row of `cache`."""
    source = jax.tree.map(lambda x: x[row : row + 1], cache.encoder_output)
    return decoder.empty(1, C, prefill.max_chunk())._replace(encoder_output=source)


@partial(jax.jit, donate_argnums=0)
def put_row(cache: Cache, row: jax.Array, single: Cache) -> Cache:
    """Compiled gptjax.models.cache.put; the old cache is donated."""
    return caches.put(cache, row, single)


def prefill_batch(decoder: Decoder, batch: Batch, C: int) -> Cache:
    """Returns a cache of B rows with a capacity of C tokens, prefilled with all but the last token of each prompt."""
    cache = init_batch_cache(decoder, batch, C)
    for row, ids in enumerate(batch.prompts):
        if len(ids) > 1:
            single = prefill.prefill(decoder, ids[:-1], init_row_cache(decoder, cache, row, C))
            cache = put_row(cache, jnp.asarray(row), single._replace(encoder_output=None))
    return cache
