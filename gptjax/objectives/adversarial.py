"""Adversarial training: adds an objective's loss under a worst-case perturbation of the embedded tokens.

Each row has its own perturbation, whose norm does not depend on other rows, so that the loss does not depend on slices
or devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives.objective import Loss

# Number of gradient steps of each attack; None: `config.objective.adversarial_steps`.
ATTACKS: dict[str, int | None] = {"none": 0, "fgm": 1, "pgd": None}


def adversarial(loss: Loss, model: nn.Module, options: Any) -> Loss:
    """Adds to a loss the same loss under a perturbation of the embedded tokens (arXiv 1605.07725 eq. 5 and 6).

    Args:
      loss: loss of any objective.
      model: the model of the loss.
      options: `config.objective`: `adversarial` is fgm, a single step along the gradient, or pgd, `adversarial_steps`
        steps within the ball of radius `epsilon` (arXiv 1706.06083 eq. 1 and 2), or none.

    Returns:
      A loss with the metrics of `loss` and "adversarial_loss", the added term.
    """
    fixed_steps = ATTACKS[options.adversarial]
    steps = options.adversarial_steps if fixed_steps is None else fixed_steps
    if not steps:
        return loss

    def total(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        name, shape = models.perturbation_spec(model, batch)

        def perturbed_loss(shift: jax.Array, params: Any) -> jax.Array:
            return loss(params, {**batch, name: shift}, rng)[0]

        fixed = jax.lax.stop_gradient(params)  # no gradient flows through the perturbation
        shift = worst_perturbation(lambda shift: jax.grad(perturbed_loss)(shift, fixed), shape, options.epsilon, steps)
        clean, metrics = loss(params, batch, rng)
        perturbed = perturbed_loss(shift, params)
        return clean + perturbed, metrics | {"adversarial_loss": perturbed}

    return total


def worst_perturbation(gradient: Any, shape: tuple[int, ...], epsilon: float, steps: int) -> jax.Array:
    """Returns a perturbation [B, ...] found by gradient ascent from zero, each row's norm at most epsilon.

    A single step has the length epsilon; several have 2.5 epsilon / steps each, and are projected onto the ball.
    """
    length = epsilon if steps == 1 else 2.5 * epsilon / steps

    def step(_: Any, shift: jax.Array) -> jax.Array:
        return project(shift + length * normalize(gradient(shift)), epsilon)

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(shape))


def normalize(x: jax.Array) -> jax.Array:
    """Divides each row by its norm; 0 stays 0."""
    largest = _over_row(jnp.max, jnp.abs(x))  # squares of small gradients would underflow in float32
    x = x / jnp.where(largest > 0, largest, 1)
    return x / jnp.maximum(_length(x), 1e-12)


def project(x: jax.Array, epsilon: float) -> jax.Array:
    """Projects each row onto the ball of radius epsilon."""
    return x * jnp.minimum(1, epsilon / jnp.maximum(_length(x), 1e-30))


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(_over_row(jnp.sum, x**2))


def _over_row(f: Any, x: jax.Array) -> jax.Array:
    return f(x, axis=tuple(range(1, x.ndim)), keepdims=True)
