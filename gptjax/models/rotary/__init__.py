"""Rotary position embeddings (arXiv 2104.09864); scalings that extend the context, one a file."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.options import option
from gptjax.models.rotary.dynamic import DYNAMIC
from gptjax.models.rotary.linear import LINEAR
from gptjax.models.rotary.llama3 import LLAMA3
from gptjax.models.rotary.scaling import Scaling, base_frequencies
from gptjax.models.rotary.yarn import YARN

SCALINGS: dict[str, Scaling] = {
    "none": Scaling(lambda own, theta, K, positions: (base_frequencies(theta, K), 1.0)),
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "dynamic": DYNAMIC,
}


@dataclass(frozen=True)
class RotaryOptions:
    """Rotary positions (positions=rotary, arXiv 2104.09864)."""

    theta: float = option(
        10000.0, "base of the frequencies; the longest wavelength is about 2 pi theta tokens", above=0
    )
    fraction: float = option(1.0, "fraction of a head's columns that are rotated, the first ones", above=0, most=1)
    scaling: str = option("none", "context extension", choices=SCALINGS)


class Rotation(NamedTuple):
    """Cosines and sines of rotary position embeddings, float32, for pairs (i, i + R/2) of a head's first R columns."""

    cos_TK: jax.Array  # R/2 columns, as in sin_TK; with a leading B if positions have it
    sin_TK: jax.Array

    def apply(self, x_BTHK: jax.Array) -> jax.Array:
        """Rotates queries or keys by their positions (arXiv 2104.09864 eq. 34, with GPT-NeoX's pairs of halves)."""
        cos, sin = self.cos_TK[..., None, :], self.sin_TK[..., None, :]
        R = 2 * cos.shape[-1]
        first, second = jnp.split(x_BTHK[..., :R].astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        rotated = rotated.astype(x_BTHK.dtype)
        return rotated if x_BTHK.shape[-1] == R else jnp.concatenate([rotated, x_BTHK[..., R:]], axis=-1)


def rotation(config: Any, positions: jax.Array) -> Rotation:
    """Angles p * theta^(-2i/R) of `config.model.rotary` (arXiv 2104.09864 eq. 15), with its scaling.

    The positions p are [T] or [B, T].
    """
    rotary = config.rotary
    own = rotary.get(rotary.scaling, None)
    R = int(config.head_width * rotary.fraction)
    frequencies, factor = SCALINGS[rotary.scaling].frequencies(own, rotary.theta, R, positions)
    angles_TK = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(jnp.cos(angles_TK) * factor, jnp.sin(angles_TK) * factor)
