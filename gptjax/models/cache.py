"""Key/value cache: an argument and a result of pure functions, never a mutable state.

The token at position p of a row is in slot p mod S of its layer: a layer with a sliding window needs only as many
slots as the window, and rows of a batch may have different lengths without padding. Independent of parameters and of
sampling.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models.kernels.reference import AttentionSpec, masked_attend, prepend_prefix, score_bias


class LayerCache(NamedTuple):
    """Key/value cache of one layer, S slots per row."""

    k_BGSK: jax.Array
    v_BGSK: jax.Array


class Cache(NamedTuple):
    """Cache of all layers, and the number of tokens in each row."""

    layers: Any  # LayerCaches, or states [B, ...] of recurrent layers
    length_B: jax.Array  # int32
    encoder_output: Any = None  # of an encoder-decoder: the source, projected for the decoder's layers, [B, ...]


def num_slots(window: int, capacity: int, ahead: int) -> int:
    """The number of slots that a layer needs, so that no slot is overwritten while a query can still attend to it.

    Args:
      window: the maximum number of keys that a query attends to; 0 for all.
      capacity: the maximum number of tokens of a row.
      ahead: the maximum number of tokens that are written at once, or written and then discarded.
    """
    return min(capacity, window + ahead - 1) if window else capacity


def init_layers(config: Any, rows: int, capacity: int, ahead: int, dtype: str) -> tuple[LayerCache, ...]:
    """Initializes empty caches of a Transformer's layers.

    Args:
      config: `config.model`.
      rows: B.
      capacity, ahead: see `num_slots`.
      dtype: of keys and values.
    """

    def layer(number: int) -> LayerCache:
        S = num_slots(config.windows[number % len(config.windows)], capacity, ahead)
        shape = rows, config.kv_heads, S, config.head_width
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return tuple(layer(i) for i in range(config.layers))


def slot_positions(length_B: jax.Array, S: int) -> jax.Array:
    """positions_BS of the tokens in S slots after `length` tokens; negative for slots that were never written."""
    newest_B1 = length_B[:, None] - 1
    return newest_B1 - (newest_B1 - jnp.arange(S)) % S


def write(
    cache: LayerCache, k_BTGK: jax.Array, v_BTGK: jax.Array, positions_BT: jax.Array, count_B: jax.Array
) -> LayerCache:
    """Writes the first `count` of T tokens to their slots, and drops the other T - count."""
    B, T = positions_BT.shape
    S = cache.k_BGSK.shape[2]
    slots_BT = jnp.where(jnp.arange(T) < count_B[:, None], positions_BT % S, S)

    def put(old_BGSK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
        new_BTGK = new_BTGK.astype(old_BGSK.dtype)
        return old_BGSK.at[jnp.arange(B)[:, None], :, slots_BT].set(new_BTGK, mode="drop", unique_indices=True)

    return LayerCache(put(cache.k_BGSK, k_BTGK), put(cache.v_BGSK, v_BTGK))


def attend(
    q_BTHK: jax.Array, cache: LayerCache, positions_BT: jax.Array, count_B: jax.Array, spec: AttentionSpec
) -> jax.Array:
    """Causal attention of queries to all cached tokens, their own included: [B, T, H, K].

    Args:
      q_BTHK: queries.
      cache: with the keys and values of the same tokens, from `write`.
      positions_BT: positions of the queries.
      count_B: the number of valid tokens among T; the output for the others is finite.
      spec: window, scale and slopes; without segments and dropout.
    """
    newest_B1 = positions_BT[:, :1] + count_B[:, None] - 1
    # Invalid tokens take the position of the last valid one: beyond it, all keys might be masked, which is not finite.
    positions_BT = jnp.minimum(positions_BT, newest_B1)
    keys_BS = slot_positions(newest_B1[:, 0] + 1, cache.k_BGSK.shape[2])
    distance_BTS = positions_BT[:, :, None] - keys_BS[:, None]
    mask_BTS = (keys_BS[:, None] >= 0) & (distance_BTS >= 0)
    if not (isinstance(spec.window, int) and spec.window == 0):
        mask_BTS &= distance_BTS < spec.window
    bias = score_bias(spec, distance_BTS)
    k_BSGK, v_BSGK = (x.swapaxes(1, 2).astype(q_BTHK.dtype) for x in cache)
    k_BSGK, v_BSGK, mask, bias = prepend_prefix(spec.prefix, k_BSGK, v_BSGK, mask_BTS[:, None], bias)
    return masked_attend(q_BTHK, k_BSGK, v_BSGK, mask, spec.scale, bias)


def take_rows(cache: Cache, rows_N: jax.Array) -> Cache:
    """Takes rows of a cache in the given order; rows may repeat.

    The encoder output stays as it is: consecutive rows of the same source share it.
    """
    layers = jax.tree.map(lambda x: jnp.take(x, rows_N, axis=0, unique_indices=False), cache.layers)
    return Cache(layers, cache.length_B[rows_N], cache.encoder_output)


def repeat_rows(cache: Cache, times: int) -> Cache:
    """Repeats each row of a cache for several hypotheses of one text.

    The repeated rows share their encoder output, except with recurrent layers, which cannot.
    """
    rows_N = jnp.repeat(jnp.arange(len(cache.length_B)), times)
    repeated = take_rows(cache, rows_N)
    if can_crop(cache):
        return repeated
    return repeated._replace(encoder_output=jax.tree.map(lambda x: x[rows_N], cache.encoder_output))


def pad_to(tree: Any, shapes: Any) -> Any:
    """Pads the arrays of a cache with zeros at the end of each axis to the given shapes.

    A layer cache that has overwritten tokens cannot be padded: the slots of its tokens would change.
    """

    def pad(leaf: jax.Array, shape: Any) -> jax.Array:
        return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, shape.shape, strict=True)])

    return jax.tree.map(pad, tree, shapes)


def can_crop(cache: Cache) -> bool:
    """Returns True if reducing a row's length removes its newest tokens: not with recurrent states."""
    parts = jax.tree.leaves(cache.layers, is_leaf=lambda part: isinstance(part, LayerCache))
    return all(isinstance(part, LayerCache) for part in parts)


def put(cache: Cache, row: jax.Array | int, single: Cache) -> Cache:
    """Replaces one row by that of a cache of a single row, which may have more slots and a shorter source.

    The row keeps its encoder output if `single` has none.
    """

    def replace(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis=0)

    def replace_layer(old: Any, new: Any) -> Any:
        if not isinstance(old, LayerCache):
            return replace(old, new)
        S = old.k_BGSK.shape[2]
        slots_S = jnp.maximum(slot_positions(single.length_B, S), 0)[0] % new.k_BGSK.shape[2]
        return LayerCache(*(replace(o, jnp.take(n, slots_S, axis=2)) for o, n in zip(old, new, strict=True)))

    layers = jax.tree.map(replace_layer, cache.layers, single.layers, is_leaf=lambda part: isinstance(part, LayerCache))
    encoder_output = cache.encoder_output
    if single.encoder_output is not None:
        encoder_output = jax.tree.map(
            replace, encoder_output, pad_to(single.encoder_output, jax.tree.map(lambda x: x[:1], encoder_output))
        )
    return Cache(layers, replace(cache.length_B, single.length_B), encoder_output)
