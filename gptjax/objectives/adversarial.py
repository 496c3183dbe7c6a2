"""Adversarial training: any objective asked once more where the embedded tokens are shifted to what hurts it most.

The shift is each row's own, of a length that does not depend on the others, so that slices and devices change nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives.objective import Loss

# How many steps each takes; None: as many as the config says.
ATTACKS: dict[str, int | None] = {"none": 0, "fgm": 1, "pgd": None}


def adversarial(loss: Loss, model: nn.Module, options: Any) -> Loss:
    """The loss plus the same loss under a shift of the embedded tokens (arXiv 1605.07725 eq. 5 and 6).

    Args:
      loss: any objective's.
      model: that it asks.
      options: `config.objective`: `adversarial` is fgm, a single step along the gradient, or pgd, `adversarial_steps`
        steps within the ball of radius `epsilon` (arXiv 1706.06083 eq. 1 and 2), or none.

    Returns:
      as `loss`, whose metrics stay; "adversarial_loss" is the second part.
    """
    known = ATTACKS[options.adversarial]
    steps = options.adversarial_steps if known is None else known
    if not steps:
        return loss

    def both(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        name, shape = models.perturbation_spec(model, batch)

        def under(shift: jax.Array, params: Any) -> jax.Array:
            return loss(params, {**batch, name: shift}, rng)[0]

        fixed = jax.lax.stop_gradient(params)  # so that the shift has no gradient
        shift = worst(lambda shift: jax.grad(under)(shift, fixed), shape, options.epsilon, steps)
        plain, metrics = loss(params, batch, rng)
        hurt = under(shift, params)
        return plain + hurt, metrics | {"adversarial_loss": hurt}

    return both


def worst(gradient: Any, shape: tuple[int, ...], epsilon: float, steps: int) -> jax.Array:
    """The shift [B, ...] that steps up the gradient lead to from none, each row's no longer than epsilon.

    A single step has the length epsilon; several are of 2.5 epsilon / steps each, and what leaves the ball is put back
    on it.
    """
    length = epsilon if steps == 1 else 2.5 * epsilon / steps

    def step(_: Any, shift: jax.Array) -> jax.Array:
        return within(shift + length * unit(gradient(shift)), epsilon)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(shape))


def unit(x: jax.Array) -> jax.Array:
    """Each row divided by its length; 0 stays 0."""
    largest = _over_row(jnp.max, jnp.abs(x))  # squares of a loss's shares may be too small for float32
    x = x / jnp.where(largest > 0, largest, 1)
    return x / jnp.maximum(_length(x), 1e-12)


def within(x: jax.Array, epsilon: float) -> jax.Array:
    """Each row, shortened to the length epsilon where it is longer."""
    return x * jnp.minimum(1, epsilon / jnp.maximum(_length(x), 1e-30))


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(_over_row(jnp.sum, x**2))


def _over_row(f: Any, x: jax.Array) -> jax.Array:
    return f(x, axis=tuple(range(1, x.ndim)), keepdims=True)
