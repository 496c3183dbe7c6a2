"""What every scaling of rotary frequencies is made of."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# `(own options, theta, K, positions) -> (frequencies, factor)`: frequencies [K/2] of a head's pairs of columns, or
# [B, 1, K/2] if they depend on a row's positions [B, T]; the factor scales cosines and sines.
Frequencies = Callable[[Any, float, int, jax.Array], tuple[Any, float]]


class Scaling(NamedTuple):
    """A scaling of rotary frequencies, which extends the context.

    Attributes:
      frequencies: see `Frequencies`.
      options: dataclass of its own keys, `config.model.rotary.NAME`; None: it has none.
      hf_names: its own keys' names in Hugging Face's `rope_parameters`; with `max_position_embeddings`, which is beside
        these, the model's context is `factor` times that.
      hf_required: those that must be given there.
      hf_unsupported: keys that transformers reads for this type, and gptjax does not.
      problems: yields the problems of its own keys with each other.
    """

    frequencies: Frequencies
    options: type | None = None
    hf_names: Mapping[str, str] = {}
    hf_required: tuple[str, ...] = ()
    hf_unsupported: tuple[str, ...] = ()
    problems: Callable[[Any], Iterator[str]] = lambda own: iter(())


def base_frequencies(theta: Any, K: int) -> Any:
    """Returns theta^(-2i/K) for each pair i of K columns (arXiv 2104.09864 eq. 15)."""
    return theta ** -(np.arange(0, K, 2) / K)
