"""Scaling of initial values and learning rates with width and depth, so that hyperparameters transfer across sizes.

The maximal update parametrization (muP; arXiv 2203.03466, Table 8) as one table by groups of parameters, relative to a
base shape, at which it is bitwise the standard one. Independent of optimizers and modules; values may be traced.
"""

import math
import re
from typing import Any, NamedTuple

import jax

# The group of a parameter, by the first pattern that matches its path: which of its axes grow with the width.
GROUPS = (
    (r"(^|/)(head|router|task)/kernel$", "output"),  # D of [D, V], [D, E] and [D, labels]
    (r"(^|/)kernel$", "hidden"),  # both: D, H * K, G * K and F, of which each grows as the width does
    (r"", "input"),  # the last one: embeddings of tokens, positions and types; norms and biases, whose input is a 1
)


class Exponents(NamedTuple):
    """Exponents of width / base_width by which a group's values are scaled.

    Attributes:
      std: exponent of the initial standard deviation.
      rate: exponent of the learning rate of an optimizer with normalized updates, such as Adam.
      orthogonal_rate: exponent of the learning rate of an optimizer whose updates are orthogonal matrices times
        sqrt(larger side), such as Muon; their spectral norm is to be the same at any width (arXiv 2310.17813,
        condition 1).
      multiplier: exponent of the factor of the product.
    """

    std: float = 0.0
    rate: float = 0.0
    orthogonal_rate: float = 0.0
    multiplier: float = 0.0


# arXiv 2203.03466, Table 8, "Adam LR"; std is the root of its "Init. Var.". A tied head is an input embedding whose
# product has the output's multiplier.
TABLE: dict[str, Exponents] = {
    "input": Exponents(),
    "output": Exponents(multiplier=-1.0),
    "hidden": Exponents(std=-0.5, rate=-1.0, orthogonal_rate=-0.5),
}

PARAMETRIZATIONS = ("standard", "mup")


def width_multiplier(config: Any) -> float:
    """width / base_width, 1 in the standard parametrization; `config` is `config.model`."""
    return float(config.width / config.base_width) if config.parametrization == "mup" else 1.0


def depth_factor(config: Any) -> float:
    """sqrt(base_layers / layers), the factor of residual branches and of their rates (arXiv 2310.02244, Table 1)."""
    return math.sqrt(config.base_layers / config.layers) if config.base_layers else 1.0


def output_multiplier(config: Any) -> float:
    """Factor of the products that compute logits, router scores or task outputs."""
    return width_multiplier(config) ** TABLE["output"].multiplier


def group(path: str) -> str:
    """The group of a parameter, by its path, such as "block_0/mlp/up/kernel"."""
    return next(name for pattern, name in GROUPS if re.search(pattern, path))


def scale_init(params: Any, config: Any) -> Any:
    """Scales parameters initialized in the standard parametrization to that of `config`."""
    width = width_multiplier(config)
    if width == 1:
        return params

    def scale(path: Any, leaf: jax.Array) -> jax.Array:
        exponent = TABLE[group(_join(path))].std
        return leaf * width**exponent if exponent else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def learning_rate_multipliers(params: Any, config: Any, orthogonal: bool = False) -> Any | None:
    """Factors of the learning rate by parameter; None if all are 1.

    Args:
      params: parameters, a part of them, or their shapes.
      config: `config.model`.
      orthogonal: True for an optimizer whose updates are orthogonal matrices.
    """
    width, depth = width_multiplier(config), depth_factor(config)
    if width == 1 and depth == 1:
        return None

    def factor(path: Any, leaf: Any) -> float:
        name = _join(path)
        exponents = TABLE[group(name)]
        hidden = group(name) == "hidden"
        return width ** (exponents.orthogonal_rate if orthogonal else exponents.rate) * (depth if hidden else 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def _join(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
