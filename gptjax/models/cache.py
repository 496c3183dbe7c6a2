"""Keys and values of the tokens that were read, kept for those that come: an argument and a result, never a state.

The token at position p of a row lies in slot p mod S of its layer, so a layer that looks back a window needs no more
slots than that, and rows of one batch may have read different numbers of tokens: nothing is padded, nothing is moved.
Nothing here knows parameters or draws a token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models.kernels.reference import AttentionSpec, bias_of, masked_attend, prefixed


class LayerCache(NamedTuple):
    """Of one layer; S slots a row."""

    k_BGSK: jax.Array
    v_BGSK: jax.Array


class Cache(NamedTuple):
    """Of all layers, and how many tokens each row has read."""

    layers: Any  # LayerCaches, or, of recurrent layers, states [B, ...]
    length_B: jax.Array  # int32
    heard: Any = None  # of an encoder-decoder: a source, as the decoder's layers read it, [B, ...]


def slots(window: int, capacity: int, ahead: int) -> int:
    """How many slots a layer needs, so that none is written again while a token may still read it.

    Args:
      window: how many keys a query reads at most; 0 for all.
      capacity: the most tokens that a row ever holds.
      ahead: the most tokens that are written at once, or written and then taken back.
    """
    return min(capacity, window + ahead - 1) if window else capacity


def empty_layers(config: Any, rows: int, capacity: int, ahead: int, dtype: str) -> tuple[LayerCache, ...]:
    """The caches of a Transformer's layers, of no tokens yet; memory is taken as `slots` says.

    Args:
      config: `config.model`.
      rows: B.
      capacity, ahead: as of `slots`.
      dtype: of keys and values.
    """

    def layer(number: int) -> LayerCache:
        S = slots(config.windows[number % len(config.windows)], capacity, ahead)
        shape = rows, config.kv_heads, S, config.head_width
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return tuple(layer(i) for i in range(config.layers))


def held(length_B: jax.Array, S: int) -> jax.Array:
    """positions_BS of the tokens that S slots hold after `length` tokens; negative where nothing was written yet."""
    newest_B1 = length_B[:, None] - 1
    return newest_B1 - (newest_B1 - jnp.arange(S)) % S


def written(
    kept: LayerCache, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array, count_B: jax.Array
) -> LayerCache:
    """The cache with the first `count` of T tokens in their slots; the other T - count are written nowhere."""
    B, T = positions_BT.shape
    S = kept.k_BGSK.shape[2]
    slots_BT = jnp.where(jnp.arange(T) < count_B[:, None], positions_BT % S, S)

    def put(old_BGSK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
        new_BTGK = new_BTGK.astype(old_BGSK.dtype)
        return old_BGSK.at[jnp.arange(B)[:, None], :, slots_BT].set(new_BTGK, mode="drop", unique_indices=True)

    return LayerCache(put(kept.k_BGSK, k_BTGK), put(kept.v_BGSK, v_BTGK))


def attend(
    q_BTHK: jax.Array, kept: LayerCache, positions_BT: jax.Array, count_B: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Causal attention of tokens at these positions to all that the cache holds, themselves included: [B, T, H, K].

    Args:
      q_BTHK: their queries.
      kept: with their keys and values, as `written` gives it.
      positions_BT: where they stand.
      count_B: how many of the T are real; for the others it gives something finite.
      sight: window, scale and slopes; rows have no segments here, and nothing is dropped.
    """
    newest_B1 = positions_BT[:, :1] + count_B[:, None] - 1
    # What is no token stands where the last one does: past it, it might see nothing, which is not finite.
    positions_BT = jnp.minimum(positions_BT, newest_B1)
    keys_BS = held(newest_B1[:, 0] + 1, kept.k_BGSK.shape[2])
    distance_BTS = positions_BT[:, :, None] - keys_BS[:, None]
    seen_BTS = (keys_BS[:, None] >= 0) & (distance_BTS >= 0)
    if not (isinstance(spec.window, int) and spec.window == 0):
        seen_BTS &= distance_BTS < spec.window
    bias = bias_of(spec, distance_BTS)
    k_BSGK, v_BSGK = (x.swapaxes(1, 2).astype(q_BTHK.dtype) for x in kept)
    k_BSGK, v_BSGK, mask, bias = prefixed(spec.prefix, k_BSGK, v_BSGK, seen_BTS[:, None], bias)
    return masked_attend(q_BTHK, k_BSGK, v_BSGK, mask, spec.scale, bias)


def taken(cache: Cache, rows_N: jax.Array) -> Cache:
    """Those rows of a cache, in that order; one may be taken several times.

    What was heard stays: rows that heard one source stand after one another, and share it.
    """
    layers = jax.tree.map(lambda x: jnp.take(x, rows_N, axis=0, unique_indices=False), cache.layers)
    return Cache(layers, cache.length_B[rows_N], cache.heard)


def multiplied(cache: Cache, times: int) -> Cache:
    """The cache with each row that often, after one another, for as many hypotheses of one text.

    They share what they heard where layers can read it so, and recurrent ones cannot.
    """
    rows_N = jnp.repeat(jnp.arange(len(cache.length_B)), times)
    more = taken(cache, rows_N)
    return more if goes_back(cache) else more._replace(heard=jax.tree.map(lambda x: x[rows_N], cache.heard))


def grown(kept: Any, shapes: Any) -> Any:
    """What is kept, with room as in these shapes: zeros, which stand for nothing yet, behind it on every axis.

    Of a layer that is full only where every token is in it, for places change where old ones have made room.
    """

    def padded(leaf: jax.Array, shape: Any) -> jax.Array:
        return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, shape.shape, strict=True)])

    return jax.tree.map(padded, kept, shapes)


def goes_back(cache: Cache) -> bool:
    """Whether a row's newest tokens are taken back by its length alone: not where a layer keeps a state of them."""
    parts = jax.tree.leaves(cache.layers, is_leaf=lambda part: isinstance(part, LayerCache))
    return all(isinstance(part, LayerCache) for part in parts)


def put(cache: Cache, row: jax.Array | int, single: Cache) -> Cache:
    """The cache with one row replaced by that of a cache of a single row: its slots may be more, its source shorter.

    What the row has heard stays where the other one has heard nothing.
    """

    def placed(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis=0)

    def moved(old: Any, new: Any) -> Any:
        if not isinstance(old, LayerCache):
            return placed(old, new)
        S = old.k_BGSK.shape[2]
        slots_S = jnp.maximum(held(single.length_B, S), 0)[0] % new.k_BGSK.shape[2]
        return LayerCache(*(placed(o, jnp.take(n, slots_S, axis=2)) for o, n in zip(old, new, strict=True)))

    layers = jax.tree.map(moved, cache.layers, single.layers, is_leaf=lambda part: isinstance(part, LayerCache))
    heard = cache.heard
    if single.heard is not None:
        heard = jax.tree.map(placed, heard, grown(single.heard, jax.tree.map(lambda x: x[:1], heard)))
    return Cache(layers, placed(cache.length_B, single.length_B), heard)
