"""How a model's numbers change with width and depth, so that what is right for a small one is right for a large one.

The maximal-update parametrisation (arXiv 2203.03466, Table 8) as one table by groups of parameters, relative to a
base shape, at which it is the standard one to the bit. Knows no optimizer and no module; values may be traced.
"""

import math
import re
from typing import Any, NamedTuple

import jax

# Which group a parameter is of, by the first pattern that its path has: what of its axes grows with the width.
GROUPS = (
    (r"(^|/)(head|router|task)/kernel$", "output"),  # D of [D, V], [D, E] and [D, labels]
    (r"(^|/)kernel$", "hidden"),  # both: D, H * K, G * K and F, of which each grows as the width does
    (r"", "input"),  # the last one: tables of tokens, positions and types; norms and biases, whose input is a 1
)


class Exponents(NamedTuple):
    """The powers of width / base_width that a group's numbers are multiplied with.

    Attributes:
      std: the standard deviation at first.
      rate: the learning rate of an optimizer whose steps have a size of their own, such as Adam.
      orthogonal_rate: of one whose steps are orthogonal matrices times sqrt(larger side), such as Muon: their spectral
        norm is to be as large at any width (arXiv 2310.17813, condition 1).
      multiplier: the product.
    """

    std: float = 0.0
    rate: float = 0.0
    orthogonal_rate: float = 0.0
    multiplier: float = 0.0


# arXiv 2203.03466, Table 8, "Adam LR"; std is the root of its "Init. Var.". A tied head is an input table whose product
# has the output's multiplier.
TABLE: dict[str, Exponents] = {
    "input": Exponents(),
    "output": Exponents(multiplier=-1.0),
    "hidden": Exponents(std=-0.5, rate=-1.0, orthogonal_rate=-0.5),
}

PARAMETRIZATIONS = ("standard", "mup")


def growth(config: Any) -> float:
    """width / base_width, 1 in the standard parametrisation; `config` is `config.model`."""
    return float(config.width / config.base_width) if config.parametrization == "mup" else 1.0


def depth_factor(config: Any) -> float:
    """sqrt(base_layers / layers), which residual branches and their learning rates get (arXiv 2310.02244, Table 1)."""
    return math.sqrt(config.base_layers / config.layers) if config.base_layers else 1.0


def multiplier(config: Any) -> float:
    """What a product that makes logits, scores or labels is multiplied with."""
    return growth(config) ** TABLE["output"].multiplier


def group(path: str) -> str:
    """The group of a parameter, "block_0/mlp/up/kernel"."""
    return next(name for pattern, name in GROUPS if re.search(pattern, path))


def drawn(params: Any, config: Any) -> Any:
    """First parameters as the parametrisation has them, of those drawn as the standard one has them."""
    by = growth(config)
    if by == 1:
        return params

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        power = TABLE[group(_joined(path))].std
        return leaf * by**power if power else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


def rate_factors(params: Any, config: Any, orthogonal: bool = False) -> Any | None:
    """What each parameter's learning rate is multiplied with; None where it is 1 for all.

    Args:
      params: or a part of them, or their shapes.
      config: `config.model`.
      orthogonal: of an optimizer whose steps are orthogonal matrices.
    """
    by, deep = growth(config), depth_factor(config)
    if by == 1 and deep == 1:
        return None

    def factor(path: Any, leaf: Any) -> float:
        name = _joined(path)
        own = TABLE[group(name)]
        hidden = group(name) == "hidden"
        return by ** (own.orthogonal_rate if orthogonal else own.rate) * (deep if hidden else 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
