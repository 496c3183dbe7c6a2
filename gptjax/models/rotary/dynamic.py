"""Dynamic NTK-aware scaling (bloc97 and emozilla 2023, as in arXiv 2309.00071, appendix B.3)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.options import option
from gptjax.models.rotary.scaling import Scaling


@dataclass(frozen=True)
class DynamicOptions:
    """Dynamic NTK-aware scaling (scaling=dynamic, arXiv 2309.00071)."""

    factor: float = option(2.0, "ratio of the extended context to original_context", above=0)
    original_context: int = option(2048, "context in tokens up to which nothing is scaled", above=0)


def dynamic(own: Any, theta: float, K: int, positions: jax.Array) -> tuple[Any, float]:
    """Raises theta with the number of tokens, of each row for itself, once they exceed `original_context`.

    As in transformers, keys in a cache keep the rotation of the length at which they were computed, so that a long
    text differs slightly between one pass and decoding token by token.
    """
    length = jnp.maximum(positions.max(-1, keepdims=True)[..., None] + 1, own.original_context)
    ratio = own.factor * length / own.original_context - (own.factor - 1)
    return (theta * ratio ** (K / (K - 2))) ** -(np.arange(0, K, 2) / K), 1.0


DYNAMIC = Scaling(
    dynamic, DynamicOptions, {"factor": "factor", "original_context": "max_position_embeddings"}, ("factor",)
)
