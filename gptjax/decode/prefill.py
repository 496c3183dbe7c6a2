"""Prefill of a key/value cache: in chunks of few lengths, so that a new prompt length seldom compiles a program.

The encoder of an encoder-decoder reads a source first, whole, padded to one of few lengths; the decoder then reads its
own text. Pure functions of a model, its parameters and a cache; no token is sampled here.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax import models
from gptjax.core import machine
from gptjax.models import cache as caches
from gptjax.models.cache import Cache
from gptjax.models.positions import POSITIONS

MIN_CHUNK = 16  # tokens of the shortest chunk that a program is compiled for


class Decoder(NamedTuple):
    """A model that decodes with a cache, as prepared by gptjax.models.for_few_rows."""

    model: nn.Module
    params: Any
    dtype: str  # of keys and values

    def empty(self, rows: int, capacity: int, ahead: int, source: int = 0) -> Cache:
        """Returns an empty cache for `rows` rows; see gptjax.models.init_cache.

        Raises:
          ConfigError: there is not enough memory for it.
        """
        make = partial(models.init_cache, self.model, rows, capacity, ahead, self.dtype, source)
        machine.check_cache(jax.eval_shape(make), rows, capacity)
        return make()

    @property
    def is_encoder_decoder(self) -> bool:
        """True for an encoder-decoder, which reads a source besides its own text."""
        return models.kind(self.model) == "seq2seq"


def decoder(model: nn.Module, params: Any) -> Decoder:
    """Returns the Decoder of a model from gptjax.models.build; its cache has the dtype of the model's arithmetic."""
    model, params = models.for_decoding(model, params)
    return Decoder(model, params, model.dtype)


def can_slide(decoder: Decoder) -> bool:
    """Returns True where layers can attend from any position: not with a table of position embeddings."""
    return models.is_recurrent(decoder.model.config) or POSITIONS[decoder.model.config.positions].add is None


def with_sliding_context(decoder: Decoder) -> Decoder:
    """Returns the decoder with attention windows of at most `config.context` tokens; a recurrent model is unchanged."""
    if models.is_recurrent(decoder.model.config):
        return decoder
    config = ConfigDict(decoder.model.config)
    config.windows = tuple(min(window or config.context, config.context) for window in config.windows)
    return decoder._replace(model=decoder.model.clone(config=FrozenConfigDict(config)))


def max_chunk() -> int:
    """Returns the maximum number of tokens in a chunk; on CPU, matrix products reach full speed with few rows."""
    return 64 if jax.default_backend() == "cpu" else 512


def bucket(n: int, least: int = 64) -> int:
    """Returns the next power of two, at least `least`: few sizes compile few programs."""
    return max(least, 1 << (n - 1).bit_length())


def chunks(ids: Sequence[int], done: int, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (ids_1T, number of the T that are not padding) from token `done` to the last.

    Chunks begin at multiples of `longest` wherever `done` is one: a prompt with a cached prefix is read in the same
    chunks as a new one, and gives the same numbers.
    """
    while done < len(ids):
        chunk = ids[done : done + longest]
        T = min(longest, bucket(len(chunk), MIN_CHUNK))
        ids_1T = np.zeros((1, T), np.int32)
        ids_1T[0, : len(chunk)] = chunk
        yield ids_1T, len(chunk)
        done += len(chunk)


@partial(jax.jit, static_argnums=0)
def extend(model: nn.Module, params: Any, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> Cache:
    """Returns the cache extended by the first `count` of T more tokens of each row."""
    return models.extend(model, params, ids_BT, cache, count_B)[2]


def prefill(decoder: Decoder, ids: Sequence[int], cache: Cache, done: int = 0) -> Cache:
    """Prefills a cache of a single row with `ids`, of which it holds the first `done` already."""
    longest = max_chunk() if can_slide(decoder) else min(max_chunk(), decoder.model.config.context)
    for ids_1T, n in chunks(ids, done, longest):
        cache = extend(decoder.model, decoder.params, jnp.asarray(ids_1T), cache, jnp.array([n], jnp.int32))
    return cache


@partial(jax.jit, static_argnums=0)
def with_encoder_output(
    model: nn.Module, params: Any, source_BS: jax.Array, segments_BS: jax.Array, cache: Cache
) -> Cache:
    """Compiled gptjax.models.encode_source."""
    return models.encode_source(model, params, source_BS, segments_BS, cache)


def encode_source(decoder: Decoder, sources: Sequence[Sequence[int]], cache: Cache) -> Cache:
    """Encodes a source for each of the first rows of an encoder-decoder's cache."""
    B, longest = len(cache.length_B), max(map(len, sources))
    source_BS = np.zeros((B, source_capacity(decoder, longest)), np.int32)
    segments_BS = np.zeros_like(source_BS)
    segments_BS[len(sources) :, 0] = 1  # a row without a source attends to one token
    for row, ids in enumerate(sources):
        source_BS[row, : len(ids)], segments_BS[row, : len(ids)] = ids, 1
    return with_encoder_output(decoder.model, decoder.params, source_BS, segments_BS, cache)


def source_capacity(decoder: Decoder, longest: int) -> int:
    """Returns the padded length S of a source of `longest` tokens: one of few."""
    return max(longest, min(bucket(longest, MIN_CHUNK), decoder.model.config.context))


def reusable_prefix(read_ids: Sequence[int], cache: Cache, ids: Sequence[int]) -> int:
    """Returns how many tokens of a single-row cache of `read_ids` can be reused for `ids`.

    All where the ids are equal, else whole chunks, which gives the same numbers as a new prefill; none where a layer
    has already overwritten its oldest tokens, or has a recurrent state of other tokens.
    """
    if tuple(read_ids) == tuple(ids):
        return len(ids)
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(read_ids, ids, strict=False))
    common = sum(1 for _ in equal)
    if not caches.can_crop(cache):
        return common if common == len(read_ids) and common % max_chunk() == 0 else 0
    if len(read_ids) > min(layer.k_BGSK.shape[2] for layer in cache.layers):
        return 0
    return common - common % max_chunk()
