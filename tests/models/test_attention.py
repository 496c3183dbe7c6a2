"""Attention against a loop in NumPy."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.models.attention import attend


def reference(q_BTHK, k_BSGK, v_BSGK, mask_TS):
    """One query and head at a time, softmax written out."""
    B, T, H, K = q_BTHK.shape
    share = H // k_BSGK.shape[2]
    out = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        scores = k_BSGK[b, :, h // share] @ q_BTHK[b, t, h] / np.sqrt(K)
        scores[~mask_TS[t]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v_BSGK[b, :, h // share]
    return out


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    G=st.integers(1, 3),
    share=st.integers(1, 3),
    K=st.integers(1, 8),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_attention_vs_reference(B, T, G, share, K, scale, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (scale * rng.normal(size=(B, T, heads, K)).astype("f") for heads in (G * share, G, G))
    mask = np.tri(T, dtype=bool)
    got = attend(jnp.array(q), jnp.array(k), jnp.array(v), jnp.array(mask))
    np.testing.assert_allclose(got, reference(q, k, v, mask), rtol=2e-4, atol=1e-5 * scale)


def test_a_drop_that_keeps_every_weight_changes_nothing_and_one_that_doubles_them_doubles_the_result():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(1, 4, 2, 3)), jnp.float32) for _ in range(3))
    mask = jnp.tri(4, dtype=bool)
    plain = attend(q, k, v, mask)
    np.testing.assert_array_equal(attend(q, k, v, mask, drop=lambda w: w), plain)
    np.testing.assert_allclose(attend(q, k, v, mask, drop=lambda w: 2 * w), 2 * plain, rtol=1e-6)
