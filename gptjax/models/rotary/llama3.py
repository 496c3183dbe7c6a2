"""Scaling of Llama 3.1: low frequencies are divided, high ones stay."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.config.options import option
from gptjax.models.rotary.scaling import Scaling, base_frequencies


@dataclass(frozen=True)
class Llama3Options:
    """Llama 3.1's context extension (scaling=llama3)."""

    factor: float = option(8.0, "ratio of the extended context to original_context", above=0)
    low_frequency_factor: float = option(
        1.0, "frequencies with fewer periods than this in original_context are divided by factor"
    )
    high_frequency_factor: float = option(
        4.0, "frequencies with more periods than this in original_context are unchanged"
    )
    original_context: int = option(8192, "context in tokens before the extension")


def llama3(own: Any, theta: float, K: int, positions: jax.Array) -> tuple[Any, float]:
    """Divides low frequencies by `factor`, with linear interpolation up to those that are high enough to stay
    (`apply_scaling` in Meta's reference code of Llama 3.1).
    """
    frequencies = base_frequencies(theta, K)
    periods = own.original_context * frequencies / (2 * math.pi)
    low, high = own.low_frequency_factor, own.high_frequency_factor
    smooth = np.clip((periods - low) / (high - low), 0, 1)
    return smooth * frequencies + (1 - smooth) * frequencies / own.factor, 1.0


def problems(own: Any) -> Iterator[str]:
    """Yields problems of the factors of frequencies."""
    if own.low_frequency_factor >= own.high_frequency_factor:
        yield "low_frequency_factor must be less than high_frequency_factor"


LLAMA3 = Scaling(
    llama3,
    Llama3Options,
    {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    ("factor", "low_freq_factor", "high_freq_factor"),
    problems=problems,
)
