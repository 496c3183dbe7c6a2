"""Induction heads, which attend to the token after an earlier occurrence of the current token.

Scores them by prefix matching on a repeated sequence of random tokens (arXiv 2209.11895).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.interpret import attention


def repeated_tokens(key: jax.Array, rows: int, length: int, vocabulary: int) -> jax.Array:
    """Random token ids, each row repeated once: int32 [B, 2 * length]."""
    half = jax.random.randint(key, (rows, length), 0, vocabulary, jnp.int32)
    return jnp.concatenate([half, half], axis=1)


def scores_from_maps(maps_LBHTT: Any) -> np.ndarray:
    """Induction scores [L, H]: mean attention, in the second half, to the token after the first occurrence.

    Scores range from 0 to 1; uniform attention scores about 1 / T.
    """
    maps = np.asarray(maps_LBHTT)
    half = maps.shape[-1] // 2
    queries = np.arange(half, 2 * half)
    return maps[..., queries, queries - half + 1].mean((1, 3))


def scores(model: nn.Module, params: Any, key: jax.Array, rows: int = 8, length: int | None = None) -> np.ndarray:
    """Computes each head's induction score [L, H] on random tokens; see `scores_from_maps`.

    Args:
      model: a decoder.
      params: of the model.
      key: random key of the tokens.
      rows: number of sequences to average over.
      length: of the repeated sequence; None: half of the model's context.

    Raises:
      ConfigError: the model is not a decoder or an encoder with attention.
    """
    config = model.config  # type: ignore[attr-defined]
    ids_BT = repeated_tokens(key, rows, length or config.context // 2, config.vocabulary)
    return scores_from_maps(attention.maps(model, params, ids_BT))
