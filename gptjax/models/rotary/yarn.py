"""YaRN (arXiv 2309.00071)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.config.options import option
from gptjax.models.rotary.scaling import Scaling, base_frequencies


@dataclass(frozen=True)
class YarnOptions:
    """YaRN (scaling=yarn, arXiv 2309.00071)."""

    factor: float = option(8.0, "ratio of the extended context to original_context", above=0)
    original_context: int = option(8192, "context in tokens before the extension", above=0)
    beta_fast: float = option(32.0, "frequencies with more periods than this in original_context stay", above=0)
    beta_slow: float = option(1.0, "frequencies with fewer periods than this are divided by factor", above=0)
    attention_factor: float | None = option(None, "factor of cosines and sines; None: 0.1 ln(factor) + 1", above=0)
    truncate: bool = option(True, "round the pairs of columns between which frequencies are interpolated")


def yarn(own: Any, theta: float, K: int, positions: jax.Array) -> tuple[Any, float]:
    """Interpolates between divided and unchanged frequencies by the index of the pair of columns (arXiv 2309.00071,
    section 3.2), as transformers does; the temperature of attention (section 3.4) is a factor of cosines and sines.
    """

    def pair_with(periods: float) -> float:
        return K * math.log(own.original_context / (2 * math.pi * periods)) / (2 * math.log(theta))

    low, high = pair_with(own.beta_fast), pair_with(own.beta_slow)
    if own.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, K - 1)
    divided = np.clip((np.arange(K // 2) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = base_frequencies(theta, K)
    factor = own.attention_factor or (0.1 * math.log(own.factor) + 1 if own.factor > 1 else 1.0)
    return divided * frequencies / own.factor + (1 - divided) * frequencies, factor


YARN = Scaling(
    yarn,
    YarnOptions,
    {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
    ("factor",),
    hf_unsupported=("mscale", "mscale_all_dim"),
)
