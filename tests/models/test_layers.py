"""Layers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.models.kernels.reference import unembed
from gptjax.models.layers import ACTIVATIONS, Head, LayerNorm, Linear, RMSNorm, TokenEmbedding
from gptjax.models.positions import LearnedPositions


@settings(max_examples=15, deadline=None)
@given(D=st.integers(1, 40), rows=st.integers(1, 9), scale=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_layer_norm_vs_reference(D, rows, scale, seed):
    rng = np.random.default_rng(seed)
    x, gain, bias = rng.normal(3, scale, (2, rows, D)).astype("f"), rng.normal(size=D), rng.normal(size=D)
    params = {"scale": jnp.array(gain, "f"), "bias": jnp.array(bias, "f")}
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(LayerNorm().apply({"params": params}, x), expected, atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(D=st.integers(1, 40), rows=st.integers(1, 9), scale=st.floats(0.1, 100), seed=st.integers(0, 99))
def test_rms_norm_vs_reference(D, rows, scale, seed):
    rng = np.random.default_rng(seed)
    x, gain = rng.normal(3, scale, (2, rows, D)).astype("f"), rng.normal(size=D)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * gain
    got = RMSNorm(epsilon=1e-3).apply({"params": {"scale": jnp.array(gain, "f")}}, x)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_linear_vs_reference():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 3, 5)), rng.normal(size=(5, 7)), rng.normal(size=7)
    got = Linear(7).apply({"params": {"kernel": kernel.astype("f"), "bias": bias.astype("f")}}, x.astype("f"))
    np.testing.assert_allclose(got, x @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_linear_gradient_vs_reference():
    rng = np.random.default_rng(1)
    x, kernel, dy = (rng.normal(size=s).astype("f") for s in ((2, 3, 5), (5, 7), (2, 3, 7)))
    model = Linear(7, use_bias=False)
    _, pull = jax.vjp(lambda k, x: model.apply({"params": {"kernel": k}}, x), kernel, x)
    dkernel, dx = pull(dy)
    np.testing.assert_allclose(dkernel, np.einsum("btd,btf->df", x, dy), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ kernel.T, rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_looks_up_in_the_heads_own_table():
    table = np.random.default_rng(0).normal(size=(11, 4)).astype("f")
    model, params = TokenEmbedding(11, 4), {"params": {"embedding": table}}
    ids = np.array([[1, 10, 0]])
    x = model.apply(params, ids)
    np.testing.assert_array_equal(x, table[ids])
    np.testing.assert_array_equal(model.apply(params, method="unembedding"), table)


def test_an_untied_head_gives_a_row_a_token():
    kernel = np.random.default_rng(0).normal(size=(4, 11)).astype("f")
    np.testing.assert_array_equal(Head(11, 4).apply({"params": {"kernel": kernel}}, method="unembedding"), kernel.T)


def test_capped_logits_vs_reference():
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(2, 3, 4)).astype("f"), rng.normal(size=(11, 4)).astype("f")
    np.testing.assert_allclose(unembed(x, table, 0.0), x @ table.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(unembed(x, table, 2.0), 2 * np.tanh(x @ table.T / 2), rtol=1e-5, atol=1e-5)
    assert unembed(x.astype(jnp.bfloat16), table, 0.0).dtype == jnp.float32


def test_more_tokens_than_positions_is_an_error():
    with pytest.raises(ValueError, match="5 tokens are more than the 4 learned positions"):
        LearnedPositions(tiny_config(model_context=4).model).init(jax.random.key(0), jnp.zeros((1, 5, 2)))


def test_activations_vs_reference():
    x = np.linspace(-4, 4, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    from math import erf

    exact = np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in x])
    expected = {"gelu": exact, "gelu_tanh": tanh, "relu": np.maximum(x, 0), "silu": x / (1 + np.exp(-x))}
    expected["relu2"] = np.maximum(x, 0) ** 2
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.array(x, jnp.float32)), values, atol=1e-6, err_msg=name)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    model = Linear(8, dtype="bfloat16")
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert model.apply(params, jnp.ones((2, 4))).dtype == jnp.bfloat16
