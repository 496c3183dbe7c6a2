"""Position encodings against the formulas of their papers, and scaled rotary embeddings against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gptjax.config.options import defaults
from gptjax.models.positions import (
    POSITIONS,
    LearnedPositions,
    SinusoidalPositions,
    alibi_slopes,
    segment_positions,
)
from gptjax.models.rotary import SCALINGS, RotaryOptions, rotation

ROTARY = defaults(RotaryOptions).to_dict()


def config_of(K, **changes):
    return ConfigDict(dict(head_width=K, rotary=ROTARY | changes))


@pytest.mark.parametrize("D", [8, 7, 1])
def test_sinusoidal_vs_reference(D):
    expected = np.zeros((5, D))
    for p in range(5):
        for i in range(D):
            angle = p / 10_000 ** (2 * (i // 2) / D)
            expected[p, i] = np.sin(angle) if i % 2 == 0 else np.cos(angle)
    got = SinusoidalPositions(None).apply({}, jnp.ones((2, 5, D)))
    np.testing.assert_allclose(got, 1 + np.broadcast_to(expected, (2, 5, D)), atol=1e-6)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(K=st.integers(1, 8).map(lambda half: 2 * half), T=st.integers(1, 9), seed=st.integers(0, 99))
def test_rotary_vs_complex_numbers(K, T, seed):
    """Columns i and i + K/2 are real and imaginary part of a number that is rotated by p theta^(-2i/K)."""
    x = np.random.default_rng(seed).normal(size=(2, T, 3, K)).astype("f")
    numbers = x[..., : K // 2] + 1j * x[..., K // 2 :]
    turned = numbers * np.exp(1j * np.arange(T)[:, None] * 10_000 ** (-2 * np.arange(K // 2) / K))[:, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    got = rotation(config_of(K), jnp.arange(T)).apply(jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 500), distance=st.integers(0, 40), seed=st.integers(0, 99))
def test_rotary_products_depend_on_distance_alone(shift, distance, seed):
    q, k = np.random.default_rng(seed).normal(size=(2, 1, 1, 1, 8)).astype("f")

    def product(p):
        at = [rotation(config_of(8), jnp.array([position])) for position in (p + distance, p)]
        return float((at[0].apply(jnp.asarray(q)) * at[1].apply(jnp.asarray(k))).sum())

    assert product(shift) == pytest.approx(product(0), abs=2e-4)


RESCALED = {
    "linear": dict(factor=6.0),
    "llama3": dict(factor=6.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=6.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0),
    "dynamic": dict(factor=6.0),
}


@pytest.mark.parametrize("T", [9, 700])
@pytest.mark.parametrize("scaling", RESCALED)
def test_scaled_rotary_vs_transformers(scaling, T):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(rope_type=scaling, rope_theta=500.0) | RESCALED[scaling]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=512, rope_parameters=rope
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](config, device="cpu", seq_len=T)
    angles = np.arange(T)[:, None] * frequencies.numpy()
    names = SCALINGS[scaling].hf_names
    given = rope | dict(max_position_embeddings=512)
    own = ROTARY[scaling] | {key: given[name] for key, name in names.items() if name in given}
    got = rotation(config_of(32, theta=500.0, scaling=scaling, **{scaling: own}), jnp.arange(T))
    np.testing.assert_allclose(got.cos_TK, factor * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(got.sin_TK, factor * np.sin(angles), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(T=st.sampled_from([1, 2, 9]), documents=st.integers(1, 9), seed=st.integers(0, 99))
def test_positions_restart_in_each_document(T, documents, seed):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, documents + 1, (2, T)))
    segments[:, rng.integers(1, T + 1) :] = 0
    expected = np.zeros_like(segments)
    for b, t in np.ndindex(2, T):
        expected[b, t] = expected[b, t - 1] + 1 if t and segments[b, t] == segments[b, t - 1] else 0
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_rows_may_have_positions_of_their_own():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("f")
    positions = np.array([[0, 1, 2], [1, 0, 0]])
    learned = LearnedPositions(ConfigDict(dict(context=5, init_std=1.0)))
    drawn = {"params": {"embedding": np.random.default_rng(1).normal(size=(5, 8)).astype("f")}}
    for module, params in ((learned, drawn), (SinusoidalPositions(ConfigDict(dict(context=5))), {})):
        table = np.asarray(module.apply(params, 0 * x))[0]
        np.testing.assert_array_equal(module.apply(params, x, positions), x + table[positions])
    turn = jax.jit(lambda positions: rotation(config_of(8), positions).apply(x[:, :, None]))
    turned = turn(positions)
    for row, own in enumerate(positions):
        np.testing.assert_array_equal(turned[row], turn(own)[row])


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = (rotation(config_of(64, scaling=s), jnp.arange(2)) for s in ("none", "llama3"))
    angle, stretched = np.asarray(plain.sin_TK[1]), np.asarray(scaled.sin_TK[1])
    assert angle[0] == stretched[0] and stretched[-1] == pytest.approx(angle[-1] / 8, rel=1e-5)


def test_alibi_slopes_vs_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2**i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(1), [1 / 2**8])
    twelve = [1 / 2**i for i in range(1, 9)] + [1 / 2**0.5, 1 / 2**1.5, 1 / 2**2.5, 1 / 2**3.5]
    np.testing.assert_allclose(alibi_slopes(12), twelve, rtol=1e-6)


def test_every_kind_does_one_thing_at_most():
    added = {"learned", "sinusoidal", "sinusoidal_halves"}
    assert POSITIONS.keys() == added | {"rotary", "alibi", "relative", "none"}
    assert all(sum(part is not None for part in scheme) <= 1 for scheme in POSITIONS.values())
