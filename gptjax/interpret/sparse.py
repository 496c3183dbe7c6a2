"""Sparse autoencoder of activations (arXiv 2309.08600 section 2): an overcomplete dictionary with sparse codes.

Activations come from gptjax.interpret.sites.capture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Autoencoder(NamedTuple):
    """Parameters of x ~ f(x) W + b, f(x) = relu((x - b) E + e); rows of W, the features' directions, have norm 1."""

    encoder_DF: jax.Array
    encoder_bias_F: jax.Array
    directions_FD: jax.Array
    bias_D: jax.Array


class Progress(NamedTuple):
    """Training metrics of each step's batch."""

    unexplained: jax.Array  # squared error divided by the activations' variance
    active: jax.Array  # mean number of nonzero features per vector


def init(key: jax.Array, features: int, x_ND: jax.Array) -> Autoencoder:
    """Initializes an autoencoder with random directions, tied encoder weights and the activations' mean as bias."""
    directions_FD = _unit(jax.random.normal(key, (features, x_ND.shape[-1])))
    return Autoencoder(directions_FD.T, jnp.zeros(features), directions_FD, x_ND.mean(0))


def encode(autoencoder: Autoencoder, x_ND: jax.Array) -> jax.Array:
    """Computes the nonnegative features of activations, [N, F]."""
    return jax.nn.relu((x_ND - autoencoder.bias_D) @ autoencoder.encoder_DF + autoencoder.encoder_bias_F)


def decode(autoencoder: Autoencoder, f_NF: jax.Array) -> jax.Array:
    """Reconstructs activations from features, [N, D]."""
    return f_NF @ autoencoder.directions_FD + autoencoder.bias_D


def train(
    key: jax.Array,
    x_ND: jax.Array,
    features: int,
    steps: int,
    batch: int = 256,
    l1: float = 1e-3,
    learning_rate: float = 1e-3,
) -> tuple[Autoencoder, Progress]:
    """Trains an autoencoder by Adam.

    The loss is the squared error of a vector plus l1 times the sum of its features (section 2), for activations scaled
    to a variance of 1 per vector, so that learning_rate and l1 are comparable across layers.

    Args:
      key: random key of the initialization and of the batches.
      x_ND: activations.
      features: F; the paper uses a few times D.
      steps: number of training steps.
      batch: vectors per step.
      l1: weight of the sparsity penalty.
      learning_rate: of Adam.

    Returns:
      The autoencoder, and the metrics of each step, [steps].
    """
    optimizer = optax.adam(learning_rate)
    x_ND = jnp.asarray(x_ND)
    scale = jnp.sqrt(((x_ND - x_ND.mean(0)) ** 2).sum(-1).mean())
    x_ND = x_ND / scale

    def loss(autoencoder: Autoencoder, x_bD: jax.Array) -> tuple[jax.Array, Progress]:
        f_bF = encode(autoencoder, x_bD)
        unexplained = ((decode(autoencoder, f_bF) - x_bD) ** 2).sum(-1).mean()
        return unexplained + l1 * f_bF.sum(-1).mean(), Progress(unexplained, (f_bF > 0).sum(-1).mean())

    def step(
        carry: tuple[Autoencoder, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Autoencoder, optax.OptState], Progress]:
        autoencoder, state = carry
        x_bD = x_ND[jax.random.randint(key, (batch,), 0, len(x_ND))]
        gradient, progress = jax.grad(loss, has_aux=True)(autoencoder, x_bD)
        updates, state = optimizer.update(gradient, state)
        updated: Autoencoder = optax.apply_updates(autoencoder, updates)
        return (updated._replace(directions_FD=_unit(updated.directions_FD)), state), progress

    @jax.jit
    def run(key: jax.Array) -> tuple[Autoencoder, Progress]:
        init_key, batch_key = jax.random.split(key)
        autoencoder = init(init_key, features, x_ND)
        (autoencoder, _), progress = jax.lax.scan(
            step, (autoencoder, optimizer.init(autoencoder)), jax.random.split(batch_key, steps)
        )
        encoder_bias_F, bias_D = scale * autoencoder.encoder_bias_F, scale * autoencoder.bias_D
        return autoencoder._replace(encoder_bias_F=encoder_bias_F, bias_D=bias_D), progress

    return run(key)


def _unit(x_FD: jax.Array) -> jax.Array:
    return x_FD / jnp.maximum(jnp.linalg.norm(x_FD, axis=-1, keepdims=True), 1e-12)
