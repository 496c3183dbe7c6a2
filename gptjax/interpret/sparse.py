"""A sparse autoencoder of activations (arXiv 2309.08600 section 2): many directions, few of which make up each vector.

Knows arrays alone; activations come from gptjax.interpret.sites.capture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Autoencoder(NamedTuple):
    """x is about f(x) W + b, with f(x) = relu((x - b) E + e); rows of W, the features' directions, have length one."""

    encoder_DF: jax.Array
    encoder_bias_F: jax.Array
    directions_FD: jax.Array
    bias_D: jax.Array


class Progress(NamedTuple):
    """Of each step's batch."""

    unexplained: jax.Array  # squared error over the activations' variance
    active: jax.Array  # how many features of a vector are not 0, on average


def first(key: jax.Array, features: int, x_ND: jax.Array) -> Autoencoder:
    """Random directions, read as they are written, around the activations' mean."""
    directions_FD = _unit(jax.random.normal(key, (features, x_ND.shape[-1])))
    return Autoencoder(directions_FD.T, jnp.zeros(features), directions_FD, x_ND.mean(0))


def encoded(coder: Autoencoder, x_ND: jax.Array) -> jax.Array:
    """How much of each feature there is, none negative, [N, F]."""
    return jax.nn.relu((x_ND - coder.bias_D) @ coder.encoder_DF + coder.encoder_bias_F)


def decoded(coder: Autoencoder, f_NF: jax.Array) -> jax.Array:
    """The activations that features make, [N, D]."""
    return f_NF @ coder.directions_FD + coder.bias_D


def trained(
    key: jax.Array,
    x_ND: jax.Array,
    features: int,
    steps: int,
    batch: int = 256,
    l1: float = 1e-3,
    learning_rate: float = 1e-3,
) -> tuple[Autoencoder, Progress]:
    """An autoencoder trained by Adam, and what came of each step, [steps].

    The loss is mean squared error of a vector plus l1 times the sum of its features (section 2), both of activations
    scaled to a variance of 1 a vector, so that rates and l1 mean the same for any layer.

    Args:
      key: of the first directions and of the batches.
      x_ND: activations.
      features: F; the paper has a few times D.
      steps: of Adam.
      batch: vectors a step.
      l1: how much sparsity counts.
      learning_rate: of Adam.
    """
    optimizer = optax.adam(learning_rate)
    x_ND = jnp.asarray(x_ND)
    scale = jnp.sqrt(((x_ND - x_ND.mean(0)) ** 2).sum(-1).mean())
    x_ND = x_ND / scale

    def loss(coder: Autoencoder, x_bD: jax.Array) -> tuple[jax.Array, Progress]:
        f_bF = encoded(coder, x_bD)
        unexplained = ((decoded(coder, f_bF) - x_bD) ** 2).sum(-1).mean()
        return unexplained + l1 * f_bF.sum(-1).mean(), Progress(unexplained, (f_bF > 0).sum(-1).mean())

    def step(
        carry: tuple[Autoencoder, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Autoencoder, optax.OptState], Progress]:
        coder, state = carry
        x_bD = x_ND[jax.random.randint(key, (batch,), 0, len(x_ND))]
        gradient, progress = jax.grad(loss, has_aux=True)(coder, x_bD)
        updates, state = optimizer.update(gradient, state)
        moved: Autoencoder = optax.apply_updates(coder, updates)
        return (moved._replace(directions_FD=_unit(moved.directions_FD)), state), progress

    @jax.jit
    def train(key: jax.Array) -> tuple[Autoencoder, Progress]:
        begin, draws = jax.random.split(key)
        coder = first(begin, features, x_ND)
        (coder, _), progress = jax.lax.scan(step, (coder, optimizer.init(coder)), jax.random.split(draws, steps))
        encoder_bias_F, bias_D = scale * coder.encoder_bias_F, scale * coder.bias_D
        return coder._replace(encoder_bias_F=encoder_bias_F, bias_D=bias_D), progress

    return train(key)


def _unit(x_FD: jax.Array) -> jax.Array:
    return x_FD / jnp.maximum(jnp.linalg.norm(x_FD, axis=-1, keepdims=True), 1e-12)
