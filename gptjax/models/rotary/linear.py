"""Position interpolation (arXiv 2306.15595)."""

from dataclasses import dataclass
from typing import Any

import jax

from gptjax.config.options import option
from gptjax.models.rotary.scaling import Scaling, base_frequencies


@dataclass(frozen=True)
class LinearOptions:
    """Position interpolation (scaling=linear, arXiv 2306.15595)."""

    factor: float = option(8.0, "ratio of the extended context to the original one", above=0)


def linear(own: Any, theta: float, K: int, positions: jax.Array) -> tuple[Any, float]:
    """Divides frequencies by `factor` (arXiv 2306.15595 eq. 3)."""
    return base_frequencies(theta, K) / own.factor, 1.0


LINEAR = Scaling(linear, LinearOptions, {"factor": "factor"}, ("factor",))
