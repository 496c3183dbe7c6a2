"""Penalties: against NumPy loops, and against transformers in test_sampling.py; garbage is never looked at."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.decode import penalties
from gptjax.decode.penalties import History

V, S, B = 6, 12, 5


def case(seed, n=S):
    """Random logits and histories of few ids, so that n-grams come again."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, n + 1, B).astype(np.int32)
    history = History(rng.integers(0, V, (B, n)).astype(np.int32), length, rng.integers(0, length + 1).astype(np.int32))
    return rng.normal(size=(B, V)).astype(np.float32), history, rng


def written(history, b):
    return [int(token) for token in history.ids_BS[b, : history.length_B[b]]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_frequency_and_presence_vs_reference(seed):
    logits, history, rng = case(seed)
    frequency, presence = rng.uniform(-2, 2, (2, B)).astype(np.float32)
    frequency[0] = presence[0] = presence[1] = 0
    found = penalties.apply_frequency_and_presence(jnp.array(logits), history, frequency, presence)
    expected = logits.copy()
    for b in range(B):
        new = written(history, b)[history.prompt_B[b] :]
        for token in set(new):
            expected[b, token] -= new.count(token) * frequency[b] + presence[b]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0], logits[0])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_repeat_ngram_vs_reference(seed):
    logits, history, rng = case(seed)
    n = rng.integers(0, 5, B).astype(np.int32)
    found = np.asarray(penalties.ban_repeated_ngrams(jnp.array(logits), history, n))
    for b in range(B):
        ids = written(history, b)
        for token in range(V):
            ngrams = [ids[s : s + n[b]] for s in range(len(ids) - n[b] + 1)]
            again = n[b] > 0 and len(ids) >= n[b] - 1 and [*ids[len(ids) - n[b] + 1 :], token] in ngrams
            assert found[b, token] == (-np.inf if again else logits[b, token])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_repetition_vs_reference(seed):
    logits, history, rng = case(seed)
    penalty = np.array([1, 0.5, 2, *rng.uniform(0.5, 2, B - 3)], np.float32)
    expected = logits.copy()
    for b in range(B):
        for token in set(written(history, b)):
            expected[b, token] *= penalty[b] if logits[b, token] < 0 else 1 / penalty[b]
    found = penalties.apply_repetition_penalty(jnp.array(logits), history, penalty)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[0], logits[0])


@pytest.mark.parametrize("garbage", [0, 1, -1, -7, V, 2**31 - 1])
def test_what_lies_beyond_the_length_does_not_matter(garbage):
    logits, history, _ = case(3)
    ids = np.where(np.arange(S) < history.length_B[:, None], history.ids_BS, garbage).astype(np.int32)
    ones = np.ones(B, np.float32)
    for apply in (
        lambda history: penalties.apply_repetition_penalty(jnp.array(logits), history, 2 * ones),
        lambda history: penalties.apply_frequency_and_presence(jnp.array(logits), history, ones, ones),
        lambda history: penalties.ban_repeated_ngrams(jnp.array(logits), history, np.array([1, 2, 1, 2, 3])),
    ):
        np.testing.assert_array_equal(apply(history), apply(history._replace(ids_BS=ids)))


def test_biases_are_added_where_there_are_any():
    logits = jnp.zeros((2, V))
    ids, bias = np.array([[2, 0], [penalties.DROPPED_ID] * 2]), np.array([[1.5, -np.inf], [0, 0]], np.float32)
    np.testing.assert_array_equal(penalties.apply_logit_bias(logits, ids, bias), [[-np.inf, 0, 1.5, 0, 0, 0], [0] * V])


def test_ends_are_banned_until_enough_is_written():
    history = History(np.zeros((3, 8), np.int32), np.array([5, 5, 5]), np.array([3, 3, 3]))
    found = penalties.apply_min_tokens(jnp.zeros((3, V)), history, np.array([0, 2, 3]), ends=(1, 4))
    np.testing.assert_array_equal(np.isinf(found), [[False] * V, [False] * V, [v in (1, 4) for v in range(V)]])
