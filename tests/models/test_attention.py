"""Attention against a loop in NumPy."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.models.kernels.reference import masked_attend, visible


def reference(q_BTHK, k_BSGK, v_BSGK, mask_TS, scale, bias_HTS):
    """Attention of one query and head at a time, with an explicit softmax."""
    B, T, H, K = q_BTHK.shape
    share = H // k_BSGK.shape[2]
    out = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        scores = k_BSGK[b, :, h // share] @ q_BTHK[b, t, h] * scale + bias_HTS[h, t]
        scores[~mask_TS[t]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v_BSGK[b, :, h // share]
    return out


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    G=st.integers(1, 3),
    share=st.integers(1, 3),
    K=st.integers(1, 8),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    scale=st.sampled_from([None, 1.0, 0.3]),
    window=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_attention_vs_reference(B, T, G, share, K, size, scale, window, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (size * rng.normal(size=(B, T, heads, K)).astype("f") for heads in (G * share, G, G))
    bias = rng.normal(size=(G * share, T, T)).astype("f")
    mask = np.array([[s <= t and (window == 0 or t - s < window) for s in range(T)] for t in range(T)])
    seen = visible(jnp.arange(T), jnp.arange(T), window)
    got = masked_attend(jnp.array(q), jnp.array(k), jnp.array(v), seen, scale, jnp.array(bias))
    expected = reference(q, k, v, mask, 1 / np.sqrt(K) if scale is None else scale, bias)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5 * max(size, size**2))


def test_a_drop_that_keeps_every_weight_changes_nothing_and_one_that_doubles_them_doubles_the_result():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(1, 4, 2, 3)), jnp.float32) for _ in range(3))
    mask = jnp.tri(4, dtype=bool)
    plain = masked_attend(q, k, v, mask)
    np.testing.assert_array_equal(masked_attend(q, k, v, mask, drop=lambda w: w), plain)
    np.testing.assert_allclose(masked_attend(q, k, v, mask, drop=lambda w: 2 * w), 2 * plain, rtol=1e-6)
