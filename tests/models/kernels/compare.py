"""Compares a kernel with its reference: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def compare(actual, plain, *arguments, seed=0, value=1e-5, gradient=1e-4):
    """Asserts that values agree within 1e-5 and gradients of a random projection within 1e-4, relative to the largest.

    A gradient that is nothing but rounding counts as a hundredth of the largest of all.
    """
    dy = np.random.default_rng(seed).normal(size=jax.eval_shape(plain, *arguments).shape).astype("f")

    def both(f, arguments, dy):
        y, pull = jax.vjp(f, *arguments)
        return y, pull(dy.astype(y.dtype))

    def run(f):
        return jax.jit(lambda *given: both(f, *given))(arguments, dy)

    (y, grads), (their_y, their_grads) = run(actual), run(plain)
    assert y.shape == their_y.shape and y.dtype == their_y.dtype
    close(y, their_y, value)
    least = max(float(jnp.abs(their).max()) for their in their_grads) / 100
    for own, their in zip(grads, their_grads, strict=True):
        assert own.shape == their.shape and own.dtype == their.dtype
        close(own, their, gradient, least)


def close(actual, expected, tolerance, least=1e-30):
    """Asserts agreement within the tolerance times the largest value, or times `least` if that is more."""
    actual, expected = np.asarray(actual, "f"), np.asarray(expected, "f")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), least))


def normal(rng, *shape, scale=1.0, dtype="float32"):
    """Normal random numbers by NumPy."""
    return jnp.asarray(scale * rng.normal(size=shape), dtype)
