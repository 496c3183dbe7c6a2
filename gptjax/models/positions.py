"""Position encodings: vectors added to embeddings, rotations of queries and keys, or biases of attention scores.

Pure functions of positions and of `config.model`, independent of layers and caches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.rotary import Rotation, rotation


def segment_positions(segments_BT: jax.Array) -> jax.Array:
    """positions_BT that restart at 0 in each segment, a run of equal numbers."""
    index_T = jnp.arange(segments_BT.shape[1])
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)


def take_rows(table_SD: jax.Array, positions: jax.Array | None, T: int) -> jax.Array:
    """Rows of a table at the given positions; None takes the first T by a slice, which is cheaper."""
    return table_SD[:T] if positions is None else table_SD[positions]


class LearnedPositions(nn.Module):
    """Learned position embeddings, added to the token embeddings x_BTD.

    Positions are [T] or [B, T], below `config.context`; None for 0, 1, ..., T - 1.

    Raises:
      ValueError: T exceeds `config.context`.
    """

    config: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        T, D = x_BTD.shape[1:]
        context = self.config.context
        if T > context:
            raise ValueError(f"{T} tokens are more than the {context} learned positions")
        init = nn.initializers.normal(self.config.init_std)
        table_SD = logical_axes.parameter(self, "embedding", init, (context, D))
        return x_BTD + take_rows(table_SD, positions, T).astype(x_BTD.dtype)


class SinusoidalPositions(nn.Module):
    """Sinusoidal position encodings, added to the token embeddings x_BTD (arXiv 1706.03762 section 3.5).

    PE(p, 2i) = sin(p / 10000^(2i/D)) and PE(p, 2i+1) = cos of the same; with `halves`, all sines precede all cosines.
    Positions are as in LearnedPositions.
    """

    config: Any
    halves: bool = False

    def __call__(self, x_BTD: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        T, D = x_BTD.shape[1:]
        S = T if positions is None else max(T, self.config.context)
        angles_SD = np.arange(S)[:, None] / 10_000 ** (np.arange(D) // 2 * 2 / D)
        table_SD = np.where(np.arange(D) % 2 == 0, np.sin(angles_SD), np.cos(angles_SD))
        if self.halves:
            table_SD = np.concatenate([table_SD[:, ::2], table_SD[:, 1::2]], axis=1)
        return x_BTD + take_rows(jnp.asarray(table_SD, x_BTD.dtype), positions, T)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi, float32 [H] (arXiv 2108.12409 section 3).

    2^(-8/H), 2^(-16/H), ... for a power of two; otherwise those of the next lower power of two, then every other one
    of the next higher power, as in the paper's code.
    """

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8 / n * np.arange(1, n + 1))

    below = 2 ** int(math.log2(heads))
    return np.concatenate([geometric(below), geometric(2 * below)[::2][: heads - below]]).astype(np.float32)


class RelativePositions(nn.Module):
    """Relative position biases by bucket and head, [R, H], shared by all layers (arXiv 1910.10683)."""

    config: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return logical_axes.parameter(self, "embedding", init, (c.relative.buckets, c.heads))


class Scheme(NamedTuple):
    """A position encoding: a module added to embeddings, a rotation of queries and keys, ALiBi slopes, relative biases,
    or none."""

    add: Callable[[Any], nn.Module] | None = None
    rotate: Callable[[Any, jax.Array], Rotation] | None = None
    slopes: Callable[[int], np.ndarray] | None = None
    relative: type[nn.Module] | None = None


POSITIONS: dict[str, Scheme] = {
    "learned": Scheme(add=LearnedPositions),
    "sinusoidal": Scheme(add=SinusoidalPositions),
    "sinusoidal_halves": Scheme(add=partial(SinusoidalPositions, halves=True)),
    "rotary": Scheme(rotate=rotation),
    "alibi": Scheme(slopes=alibi_slopes),
    "relative": Scheme(relative=RelativePositions),
    "none": Scheme(),
}


class PositionInfo(NamedTuple):
    """Positions and segments of the tokens of a forward pass, as attention needs them."""

    positions: jax.Array  # [T], or [B, T] if rows differ
    rotation: Rotation | None
    slopes_H: jax.Array | None
    segments_BT: jax.Array | None  # document number of each token; None: a row is one document
    count_B: Any = None  # [B], the number of valid tokens of each row, when they extend a cache
    bidirectional_BT: jax.Array | None = None  # 1: earlier tokens attend to it as well; None: causal throughout
    relative_RH: jax.Array | None = None  # relative position biases


def position_info(
    config: Any, positions: jax.Array, segments_BT: jax.Array | None = None, count_B: jax.Array | None = None
) -> PositionInfo:
    """Computes the `PositionInfo` of `config.positions` (of `config.model`)."""
    scheme = POSITIONS[config.positions]
    rotate = scheme.rotate and scheme.rotate(config, positions)
    slopes_H = scheme.slopes and jnp.asarray(scheme.slopes(config.heads))
    return PositionInfo(positions, rotate, slopes_H, segments_BT, count_B)
