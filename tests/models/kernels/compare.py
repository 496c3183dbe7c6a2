"""What the tests of kernels share: one function against another, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def compare(ours, plain, *arguments, seed=0, value=1e-5, gradient=1e-4):
    """Values within 1e-5 and gradients of a random projection within 1e-4, relative to the largest of each.

    A gradient that is nothing but rounding counts as a hundredth of the largest of all.
    """
    dy = np.random.default_rng(seed).normal(size=jax.eval_shape(plain, *arguments).shape).astype("f")

    def both(f, arguments, dy):
        y, pull = jax.vjp(f, *arguments)
        return y, pull(dy.astype(y.dtype))

    def run(f):
        return jax.jit(lambda *given: both(f, *given))(arguments, dy)

    (y, grads), (their_y, their_grads) = run(ours), run(plain)
    assert y.shape == their_y.shape and y.dtype == their_y.dtype
    close(y, their_y, value)
    least = max(float(jnp.abs(their).max()) for their in their_grads) / 100
    for own, their in zip(grads, their_grads, strict=True):
        assert own.shape == their.shape and own.dtype == their.dtype
        close(own, their, gradient, least)


def close(ours, theirs, tolerance, least=1e-30):
    """Within the tolerance of the largest, or of `least` where that is more."""
    ours, theirs = np.asarray(ours, "f"), np.asarray(theirs, "f")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), least))


def normal(rng, *shape, scale=1.0, dtype="float32"):
    """Normal numbers of NumPy's."""
    return jnp.asarray(scale * rng.normal(size=shape), dtype)
