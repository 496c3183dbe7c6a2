"""Induction heads: they look for an earlier copy of the present token, and read what came after it.

Of arXiv 2209.11895, "prefix matching" on random tokens that are said twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.interpret import attention


def repeated(key: jax.Array, rows: int, length: int, vocabulary: int) -> jax.Array:
    """Random ids, each row said twice: int32 [B, 2 * length]."""
    half = jax.random.randint(key, (rows, length), 0, vocabulary, jnp.int32)
    return jnp.concatenate([half, half], axis=1)


def from_maps(maps_LBHTT: Any) -> np.ndarray:
    """How much each head reads, in the second half of what is said twice, of the token after the first copy: [L, H].

    0 for none, 1 for all; a head that reads evenly has about 1 / T.
    """
    maps = np.asarray(maps_LBHTT)
    half = maps.shape[-1] // 2
    now = np.arange(half, 2 * half)
    return maps[..., now, now - half + 1].mean((1, 3))


def scores(model: nn.Module, params: Any, key: jax.Array, rows: int = 8, length: int | None = None) -> np.ndarray:
    """Each head's induction score [L, H], as of `from_maps`, on drawn tokens.

    Args:
      model: a decoder.
      params: of the model.
      key: of the draw.
      rows: over how many texts the mean is taken.
      length: of what is said twice; None: half of the model's context.

    Raises:
      ConfigError: a model without such attention.
    """
    config = model.config  # type: ignore[attr-defined]
    ids_BT = repeated(key, rows, length or config.context // 2, config.vocabulary)
    return from_maps(attention.maps(model, params, ids_BT))
