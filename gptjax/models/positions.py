"""How a model knows where a token stands: vectors added to embeddings, queries and keys turned, or scores lowered.

Pure functions of positions and of `config.model`; no layer and no cache is known here.
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


def restarting(segments_BT: jax.Array) -> jax.Array:
    """positions_BT that begin at 0 in each run of equal segments."""
    index_T = jnp.arange(segments_BT.shape[1])
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)


def rows_at(table_SD: jax.Array, positions: jax.Array | None, T: int) -> jax.Array:
    """A table's rows at these positions; where they are None its first T, by a slice, which is cheaper."""
    return table_SD[:T] if positions is None else table_SD[positions]


class LearnedPositions(nn.Module):
    """One trained vector per position, added to the token embeddings x_BTD.

    The positions are [T] or [B, T], below T or `config.context`; None for 0, 1, ..., T - 1. So for SinusoidalPositions.
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
        return x_BTD + rows_at(table_SD, positions, T).astype(x_BTD.dtype)


class SinusoidalPositions(nn.Module):
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same, added (arXiv 1706.03762 section 3.5).

    `halves`: all sines first, then all cosines.
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
        return x_BTD + rows_at(jnp.asarray(table_SD, x_BTD.dtype), positions, T)


def unscaled(frequencies: np.ndarray, config: Any) -> np.ndarray:
    """Frequencies as they are."""
    return frequencies


def linear_scaling(frequencies: np.ndarray, config: Any) -> np.ndarray:
    """Positions `factor` times closer together (arXiv 2306.15595 eq. 3)."""
    return frequencies / config.factor


def llama3_scaling(frequencies: np.ndarray, config: Any) -> np.ndarray:
    """Llama 3.1's: wavelengths longer than a share of the original context are stretched, short ones are kept.

    A wave that fits `high_frequency_factor` times or more into `original_context` is kept, one that fits
    `low_frequency_factor` times or less is stretched by `factor`, with a straight line between (Meta's reference
    code of Llama 3.1, `apply_scaling`).
    """
    fits = config.original_context * frequencies / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    kept = np.clip((fits - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.factor


ROTARY_SCALINGS: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "none": unscaled,
    "linear": linear_scaling,
    "llama3": llama3_scaling,
}


class Rotation(NamedTuple):
    """The angles of rotary positions, float32; K counts the columns of a head, turned in pairs (i, i + K/2)."""

    cos_TK: jax.Array  # K/2 columns, as of sin; with B in front where positions have it
    sin_TK: jax.Array

    def turn(self, x_BTHK: jax.Array) -> jax.Array:
        """Queries or keys turned by their positions (arXiv 2104.09864 eq. 34, in the halves' order of GPT-NeoX)."""
        cos, sin = self.cos_TK[..., None, :], self.sin_TK[..., None, :]
        first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x_BTHK.dtype)


def rotation(config: Any, positions: jax.Array) -> Rotation:
    """Angles p * theta^(-2i/K) of `config.model.rotary` (arXiv 2104.09864 eq. 15), with its scaling.

    The positions p are [T] or [B, T].
    """
    K, rotary = config.head_width, config.rotary
    frequencies = rotary.theta ** -(np.arange(0, K, 2) / K)
    frequencies = ROTARY_SCALINGS[rotary.scaling](frequencies, rotary).astype(np.float32)
    angles_TK = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles_TK), jnp.sin(angles_TK))


def alibi_slopes(heads: int) -> np.ndarray:
    """How much each head's scores fall per token of distance, float32 [H] (arXiv 2108.12409 section 3).

    2^(-8/H), 2^(-16/H), ... for a power of two; else those of the power of two below, then every other one of the
    power above, as the paper's code has it.
    """

    def geometric(n: int) -> np.ndarray:
        return 2.0 ** (-8 / n * np.arange(1, n + 1))

    below = 2 ** int(math.log2(heads))
    return np.concatenate([geometric(below), geometric(2 * below)[::2][: heads - below]]).astype(np.float32)


class RelativePositions(nn.Module):
    """What each bucket of distances adds to each head's scores, [R, H], one table for all layers (arXiv 1910.10683)."""

    config: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return logical_axes.parameter(self, "embedding", init, (c.relative.buckets, c.heads))


class Scheme(NamedTuple):
    """A kind of position: a module added to embeddings, a rotation of queries and keys, slopes of scores, a table of
    what distances add to scores, or none."""

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
    """Where the tokens of a forward pass stand, as attention needs it."""

    positions: jax.Array  # [T], or [B, T] where each row has its own
    rotation: Rotation | None
    slopes_H: jax.Array | None
    segments_BT: jax.Array | None  # which document each token is of; None: a row is one
    count_B: Any = None  # [B] how many of a row's tokens are real, where they go on from a cache
    bidirectional_BT: jax.Array | None = None  # 1: tokens that are read from before, too; None: none is
    relative_RH: jax.Array | None = None  # what distances add to scores


def position_info(
    config: Any, positions: jax.Array, segments_BT: jax.Array | None = None, count_B: jax.Array | None = None
) -> PositionInfo:
    """What `config.positions` (of `config.model`) makes of these positions in these documents."""
    scheme = POSITIONS[config.positions]
    turning = scheme.rotate and scheme.rotate(config, positions)
    slopes_H = scheme.slopes and jnp.asarray(scheme.slopes(config.heads))
    return PositionInfo(positions, turning, slopes_H, segments_BT, count_B)
