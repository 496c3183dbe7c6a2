"""Sampling: the filtered distribution, not the draw."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.decode.sampling import draw, keep_top_k


@settings(max_examples=40, deadline=None)
@given(V=st.integers(1, 30), k=st.integers(0, 40), seed=st.integers(0, 99))
def test_top_k_vs_reference(V, k, seed):
    logits = np.random.default_rng(seed).permutation(V).astype("f")
    kept = np.isfinite(np.asarray(keep_top_k(jnp.array(logits), k)))
    expected = np.ones(V, bool) if k == 0 else logits >= np.sort(logits)[::-1][min(k, V) - 1]
    np.testing.assert_array_equal(kept, expected)


def test_draws_follow_the_tempered_distribution():
    logits, temperature = jnp.array([1.0, 2.0, 0.0, -1.0, 1.5]), 0.7
    keys = jax.random.split(jax.random.key(0), 20_000)
    ids = np.asarray(jax.vmap(lambda key: draw(logits, key, temperature, 3))(keys))
    weights = np.where(np.asarray(logits) >= 1, np.exp(np.asarray(logits) / temperature), 0)
    expected = weights / weights.sum() * len(keys)
    counts = np.bincount(ids, minlength=5)
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 13.8  # two degrees of freedom, p = 0.001


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.array([1.0, 3.0, 2.0])
    assert {int(draw(logits, jax.random.key(seed), 0.0, 0)) for seed in range(20)} == {1}
