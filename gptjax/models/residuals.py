"""Residual connections by name: how a block adds its sublayers to the residual stream x, and where it normalizes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Sublayer = Callable[[jax.Array], jax.Array]


class Residual(NamedTuple):
    """A way to add sublayers.

    Attributes:
      add: `(x_BTD, [(sublayer, its norm), ...], constrain) -> x_BTD`; `constrain` shards each sum.
      final_norm: True if the stream is normalized before the head.
    """

    add: Callable[[jax.Array, Sequence[tuple[Sublayer, Sublayer]], Callable[[jax.Array], jax.Array]], jax.Array]
    final_norm: bool


def one_after_another(add: Callable[[jax.Array, Sublayer, Sublayer], jax.Array]) -> Any:
    """Returns `Residual.add` of `add(x, f, norm)`, for each sublayer f in turn."""

    def add_all(x: jax.Array, sublayers: Sequence[tuple[Sublayer, Sublayer]], constrain: Sublayer) -> jax.Array:
        for f, norm in sublayers:
            x = constrain(add(x, f, norm))
        return x

    return add_all


def in_parallel(x: jax.Array, sublayers: Sequence[tuple[Sublayer, Sublayer]], constrain: Sublayer) -> jax.Array:
    """Adds all sublayers of the same x, each with its own norm."""
    return constrain(x + sum(f(norm(x)) for f, norm in sublayers))


RESIDUALS: dict[str, Residual] = {
    # arXiv 2002.04745
    "pre": Residual(one_after_another(lambda x, f, norm: x + f(norm(x))), final_norm=True),
    # OLMo 2, arXiv 2501.00656 section 3.2
    "output": Residual(one_after_another(lambda x, f, norm: x + norm(f(x))), final_norm=True),
    # GPT-J and GPT-NeoX, arXiv 2204.06745 section 2.1
    "parallel": Residual(
        lambda x, each, constrain: constrain(x + sum(f(norm(x)) for f, norm in each)), final_norm=True
    ),
    # arXiv 1706.03762 section 3.1
    "post": Residual(one_after_another(lambda x, f, norm: norm(x + f(x))), final_norm=False),
}
