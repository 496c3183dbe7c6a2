"""Gradients of our own for CPU against the plain formulas, differentiated by jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.models import cpu
from gptjax.models.attention import attend, visible
from gptjax.models.layers import ACTIVATIONS, GATES, standardise
from gptjax.training import loop


def compare(ours, plain, *arguments, seed=0):
    """Values within 1e-5 and gradients of a random projection within 1e-4, relative to the largest of each."""

    def both(f):
        y, pull = jax.vjp(f, *arguments)
        dy = np.random.default_rng(seed).normal(size=y.shape).astype("f")
        return y, pull(jnp.asarray(dy))

    (y, grads), (their_y, their_grads) = jax.jit(lambda: both(ours))(), jax.jit(lambda: both(plain))()
    np.testing.assert_allclose(y, their_y, rtol=1e-5, atol=1e-5 * float(jnp.abs(their_y).max()))
    for own, their in zip(grads, their_grads, strict=True):
        assert own.shape == their.shape and own.dtype == their.dtype
        np.testing.assert_allclose(own, their, rtol=1e-4, atol=1e-4 * float(jnp.abs(their).max()))


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


@settings(max_examples=12, deadline=None)
@given(
    D=st.integers(2, 40),
    rows=st.integers(1, 9),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    centre=st.booleans(),
    seed=st.integers(0, 99),
)
def test_standardise_vs_reference(D, rows, scale, centre, seed):
    rng = np.random.default_rng(seed)
    x, gain = normal(rng, 2, rows, D, scale=scale) + scale, normal(rng, D)
    ours, plain = (lambda x, gain, f=f: f(x, gain, 1e-5, centre) for f in (cpu.standardise, standardise))
    compare(ours, plain, x, gain)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
def test_saved_derivatives_vs_reference(name):
    f = (ACTIVATIONS | GATES)[name]
    compare(cpu.saving_derivative(f), f, normal(np.random.default_rng(0), 7, 33, scale=3))


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 5, 64, 129, 200]),
    G=st.integers(1, 2),
    share=st.integers(1, 3),
    window=st.sampled_from([0, 1, 7, 100, 300]),
    scale=st.sampled_from([None, 1.0]),
    alibi=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_vs_reference(B, T, G, share, window, scale, alibi, seed):
    rng = np.random.default_rng(seed)
    H, K = G * share, 6
    q, k, v = normal(rng, B, T, H, K), normal(rng, B, T, G, K), normal(rng, B, T, G, K)
    slopes = jnp.asarray(0.1 * np.arange(1, H + 1), jnp.float32) if alibi else None
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    bias = None if slopes is None else -slopes[:, None, None] * distance
    mask = visible(jnp.arange(T), jnp.arange(T), window)
    compare(
        lambda q, k, v: cpu.attention(q, k, v, slopes, scale, window),
        lambda q, k, v: attend(q, k, v, mask, scale, bias),
        q,
        k,
        v,
    )


@settings(max_examples=12, deadline=None)
@given(N=st.integers(1, 9), V=st.integers(1, 40), scale=st.sampled_from([0.1, 1.0, 50.0]), seed=st.integers(0, 99))
def test_cross_entropy_vs_reference(N, V, scale, seed):
    rng = np.random.default_rng(seed)
    targets = jnp.asarray(rng.integers(0, V, N))

    def plain(logits_NV):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_NV), targets[:, None], axis=-1)[:, 0]

    compare(lambda logits_NV: cpu.cross_entropy(logits_NV, targets), plain, normal(rng, N, V, scale=scale))


def test_two_hundred_steps_end_at_the_same_loss(tmp_path, text_file):
    losses = []
    for kernels in ("plain", "cpu"):
        config = tiny_config(
            data_path=text_file, train_steps=200, eval_every_steps=200, checkpoint_every_steps=200,
            optimizer_learning_rate=0.01, model_kernels=kernels,
        )  # fmt: skip
        losses.append(loop.train(config, tmp_path / kernels)["val_loss"])
    assert losses[0] < 3 and abs(losses[0] - losses[1]) < 1e-3
