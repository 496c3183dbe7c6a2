"""Label smoothing and z-loss: the reference against NumPy and PyTorch, the chunked loss against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import compare, normal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.models.kernels import chunked_cross_entropy, reference
from gptjax.models.kernels.chunked_cross_entropy import Chunking


def draw(seed, B, T, V, D=6):
    rng = np.random.default_rng(seed)
    targets, weights = rng.integers(0, V, (B, T)), rng.integers(0, 3, (B, T)).astype("f")
    return normal(rng, B, T, D), normal(rng, V, D), jnp.asarray(targets), jnp.asarray(weights)


def in_numpy(x, table, targets, weights, smoothing, z):
    """Explicit float64 formula: cross-entropy with (1 - s) one-hot + s / V, and z log^2 Z."""
    logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    log_z = np.log(np.exp(logits).sum(-1))
    V = logits.shape[-1]
    wanted = (1 - smoothing) * np.eye(V)[targets] + smoothing / V
    each = -(wanted * (logits - log_z[..., None])).sum(-1) + z * log_z**2
    nats = log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return (each * weights).sum(), (nats * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()


@pytest.mark.parametrize("smoothing, z", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.1)])
def test_plain_vs_reference(smoothing, z):
    given = draw(0, 3, 5, 11)
    np.testing.assert_allclose(
        reference.token_loss(*given, 0.0, smoothing, z), in_numpy(*given, smoothing, z), rtol=1e-5
    )


def test_label_smoothing_vs_torch():
    torch = pytest.importorskip("torch")
    x, table, targets, weights = draw(1, 2, 4, 9)
    logits = torch.tensor(np.array(x @ table.T)).reshape(-1, 9)
    wanted = torch.tensor(np.array(targets, np.int64)).reshape(-1)
    nats = torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1, reduction="none")
    expected = (nats.numpy() * np.array(weights).reshape(-1)).sum()
    np.testing.assert_allclose(reference.token_loss(x, table, targets, weights, 0.0, 0.1).loss, expected, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(
    T=st.sampled_from([1, 6, 7]),
    V=st.integers(2, 40),
    cap=st.sampled_from([0.0, 5.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    z=st.sampled_from([0.0, 0.2]),
    multiple=st.sampled_from([1, 16]),
    seed=st.integers(0, 99),
)
@example(T=6, V=33, cap=5.0, smoothing=0.1, z=0.2, multiple=16, seed=0)
@example(T=6, V=33, cap=0.0, smoothing=0.1, z=0.0, multiple=1, seed=1)
def test_slices_vs_plain(T, V, cap, smoothing, z, multiple, seed):
    x, table, targets, weights = draw(seed, 2, T, V)
    chunking = Chunking(logit_bytes=4 * V * 4, multiple=multiple)

    def actual(x, table):
        return chunked_cross_entropy.token_loss(x, table, targets, weights, cap, smoothing, z, chunking)

    def reference_value(x, table):
        return reference.token_loss(x, table, targets, weights, cap, smoothing, z)

    compare(lambda *given: actual(*given).loss, lambda *given: reference_value(*given).loss, x, table)
    np.testing.assert_allclose(jax.jit(actual)(x, table), reference_value(x, table), rtol=1e-5, atol=1e-5)
    # Metrics have no gradient, in either implementation.
    for which in (actual, reference_value):
        message = jax.grad(lambda x, which=which: which(x, table).nats + which(x, table).hits)(x)
        assert not np.any(message)
