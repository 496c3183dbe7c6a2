"""Adagrad (Duchi, Hazan and Singer 2011, "Adaptive subgradient methods for online learning")."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.config.options import option
from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale


@dataclass(frozen=True)
class AdagradOptions:
    """Sums of Adagrad; the epsilon is `optimizer.epsilon`."""

    initial: float = option(0.0, "initial value of the sums of squared gradients", traced=True)


def adagrad(context: Context) -> optax.GradientTransformation:
    """Adagrad with a diagonal matrix (figure 1): gradients divided by the root of the sum of their squares."""
    return optax.chain(scale_by_sum_of_squares(context.own.initial, context.options.epsilon), *decay_and_scale(context))


def scale_by_sum_of_squares(initial: float, epsilon: float) -> optax.GradientTransformation:
    """Divides gradients by epsilon + the root of the sum of all squared gradients so far.

    Not optax.scale_by_rss, whose epsilon is inside the root.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p: jnp.full_like(p, initial), params)

    def update(updates: Any, sums: Any, params: Any = None) -> Any:
        sums = jax.tree.map(lambda g, total: total + jnp.square(g), updates, sums)
        return jax.tree.map(lambda g, total: g / (jnp.sqrt(total) + epsilon), updates, sums), sums

    return optax.GradientTransformation(init, update)


ADAGRAD = Optimizer(adagrad, AdagradOptions, moments=1)
