"""Prompts into a cache: in pieces of few lengths, so that a new prompt length seldom compiles a program.

An encoder-decoder hears a source first, whole, in one of few lengths too; what it reads then is its own text. Pure
functions of a model, its parameters and a cache; no token is drawn here.
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

MIN_CHUNK = 16  # tokens of the shortest piece that a program is compiled for


class Decoder(NamedTuple):
    """A model that keeps what it reads, as gptjax.models.for_few_rows gives it."""

    model: nn.Module
    params: Any
    dtype: str  # of keys and values

    def empty(self, rows: int, capacity: int, ahead: int, source: int = 0) -> Cache:
        """A cache for that many rows; see gptjax.models.empty.

        Raises:
          ConfigError: there is not enough memory for it.
        """
        make = partial(models.empty, self.model, rows, capacity, ahead, self.dtype, source)
        machine.check_cache(jax.eval_shape(make), rows, capacity)
        return make()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it is an encoder-decoder, and reads a source besides its own text."""
        return models.kind(self.model) == "seq2seq"


def decoder(model: nn.Module, params: Any) -> Decoder:
    """A Reader of a model as gptjax.models.build gives it; keys and values are kept in its arithmetic's dtype."""
    model, params = models.for_few_rows(model, params)
    return Decoder(model, params, model.dtype)


def can_slide(decoder: Decoder) -> bool:
    """Whether its layers can look back from any position: not where positions are rows of a table."""
    return models.is_recurrent(decoder.model.config) or models.POSITIONS[decoder.model.config.positions].add is None


def with_sliding_context(decoder: Decoder) -> Decoder:
    """The reader of a model whose layers look back over `config.context` tokens at most; a state is of all of them."""
    if models.is_recurrent(decoder.model.config):
        return decoder
    config = ConfigDict(decoder.model.config)
    config.windows = tuple(min(window or config.context, config.context) for window in config.windows)
    return decoder._replace(model=decoder.model.clone(config=FrozenConfigDict(config)))


def max_chunk() -> int:
    """The most tokens that are read at once: on CPU products are at full speed from few rows on."""
    return 64 if jax.default_backend() == "cpu" else 512


def bucket(n: int, least: int = 64) -> int:
    """A size that few programs are compiled for: the next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def chunks(ids: Sequence[int], done: int, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """(ids_1T, how many of the T are real) from the `done`th token to the last.

    Pieces begin at multiples of `longest` wherever `done` is one: a prompt whose beginning was read before is read in
    the same pieces as a new one, and gives the same numbers.
    """
    while done < len(ids):
        piece = ids[done : done + longest]
        T = min(longest, bucket(len(piece), MIN_CHUNK))
        ids_1T = np.zeros((1, T), np.int32)
        ids_1T[0, : len(piece)] = piece
        yield ids_1T, len(piece)
        done += len(piece)


@partial(jax.jit, static_argnums=0)
def extend(model: nn.Module, params: Any, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> Cache:
    """The cache after some more tokens of each row."""
    return models.extend(model, params, ids_BT, cache, count_B)[2]


def prefill(decoder: Decoder, ids: Sequence[int], cache: Cache, done: int = 0) -> Cache:
    """A cache of a single row after these ids, of which it has read the first `done` already."""
    longest = max_chunk() if can_slide(decoder) else min(max_chunk(), decoder.model.config.context)
    for ids_1T, n in chunks(ids, done, longest):
        cache = extend(decoder.model, decoder.params, jnp.asarray(ids_1T), cache, jnp.array([n], jnp.int32))
    return cache


@partial(jax.jit, static_argnums=0)
def with_encoder_output(
    model: nn.Module, params: Any, source_BS: jax.Array, segments_BS: jax.Array, cache: Cache
) -> Cache:
    """As gptjax.models.encode_source, compiled."""
    return models.encode_source(model, params, source_BS, segments_BS, cache)


def encode_source(decoder: Decoder, sources: Sequence[Sequence[int]], cache: Cache) -> Cache:
    """The cache of an encoder-decoder, of which as many rows as there are sources have heard one each."""
    B, longest = len(cache.length_B), max(map(len, sources))
    source_BS = np.zeros((B, source_capacity(decoder, longest)), np.int32)
    segments_BS = np.zeros_like(source_BS)
    segments_BS[len(sources) :, 0] = 1  # a row without a source hears one token
    for row, ids in enumerate(sources):
        source_BS[row, : len(ids)], segments_BS[row, : len(ids)] = ids, 1
    return with_encoder_output(decoder.model, decoder.params, source_BS, segments_BS, cache)


def source_capacity(decoder: Decoder, longest: int) -> int:
    """S, in which a source of that many tokens is read: one of few."""
    return max(longest, min(bucket(longest, MIN_CHUNK), decoder.model.config.context))


def reusable_prefix(read_ids: Sequence[int], cache: Cache, ids: Sequence[int]) -> int:
    """How many tokens of a cache of a single row that has read `read_ids` serve one that is to read `ids`.

    All where they are the same, else whole pieces, so that they come to the same numbers; none where a layer has
    already made room for newer tokens, or has a state of other ones.
    """
    if tuple(read_ids) == tuple(ids):
        return len(ids)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(read_ids, ids, strict=False))
    common = sum(1 for _ in alike)
    if not caches.goes_back(cache):
        return common if common == len(read_ids) and common % max_chunk() == 0 else 0
    if len(read_ids) > min(layer.k_BGSK.shape[2] for layer in cache.layers):
        return 0
    return common - common % max_chunk()
