"""The cache: extending it piece by piece equals one forward pass, for every kind of attention of the family."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import models
from gptjax.models import cache as caches

V, T = 37, 48  # ids there are, tokens of a row
AHEAD = 8
LLAMA3 = {"model_rotary.scaling": "llama3", "model_rotary.llama3.original_context": 12}
# With matrices far larger than at first, so that tokens matter to each other.
BASE = {"model_vocabulary": V, "model_context": T, "model_init_std": 0.3, "model_heads": 4}
KINDS = {
    "learned": {},
    "sinusoidal": {"model_positions": "sinusoidal"},
    "rotary": {"model_positions": "rotary"},
    "rotary linear": {"model_positions": "rotary", "model_rotary.scaling": "linear"},
    "rotary llama3": {"model_positions": "rotary"} | LLAMA3,
    "alibi": {"model_positions": "alibi"},
    "alibi windows": {"model_positions": "alibi", "model_windows": "(4,)"},
    "none": {"model_positions": "none"},
    "windows": {"model_positions": "rotary", "model_windows": "(3, 0, 7)", "model_layers": 3},
    "grouped": {"model_kv_heads": 2, "model_positions": "rotary", "model_windows": "(1, 5)"},
    "one key head": {"model_kv_heads": 1, "model_qk_norm": "head", "model_positions": "rotary"},
    "post norm": {"model_norm_position": "post", "model_norm": "rmsnorm", "model_value_residual": True},
    "experts": {"model_mlp": "experts", "model_experts": 4, "model_windows": "(2, 0)", "model_activation": "swiglu"},
    "scale and cap": {"model_attention_scale": 0.7, "model_logit_softcap": 3.0, "model_tied_head": False},
    "scanned": {"model_scan_layers": True, "model_windows": "(3, 0)", "model_value_residual": True},
}


@cache
def made(kind):
    """(the unrolled model, its parameters, a jitted extend, ids_BT, logits_BTV of the uncached forward pass)."""
    model = models.build(tiny_config(**BASE | KINDS[kind]).model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ids_BT = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)
    logits_BTV = np.asarray(jax.jit(partial(models.logits, model))(params, ids_BT))
    model, params = models.unroll_layers(model, params)

    @jax.jit
    def extend(ids_BT, cache, count_B):
        x_BTD, unembedding_VD, cache = models.extend(model, params, ids_BT, cache, count_B)
        return models.next_logits(model, x_BTD, unembedding_VD), cache

    return model, params, extend, ids_BT, logits_BTV


def read(kind, counts, ahead=AHEAD, cache=None):
    """Logits of each row's tokens, and the cache, if each call extends it by a row of `counts`."""
    model, _, extend, ids_BT, _ = made(kind)
    B = len(counts[0])
    if cache is None:
        cache = models.init_cache(model, B, T, ahead, "float32")
    logits = [[] for _ in range(B)]
    for count_B in counts:
        begin_B = np.asarray(cache.length_B)
        piece_BT = np.zeros((B, ahead), np.int32)
        for b, (begin, n) in enumerate(zip(begin_B, count_B, strict=True)):
            piece_BT[b, :n] = ids_BT[b, begin : begin + n]
        logits_BTV, cache = extend(piece_BT, cache, np.array(count_B, np.int32))
        assert np.isfinite(logits_BTV).all(), "what is no token must not become NaN either"
        for b, n in enumerate(count_B):
            logits[b].extend(np.asarray(logits_BTV[b, :n]))
    return logits, cache


def compared(kind, logits, begins=(0, 0, 0)):
    """The largest difference from the uncached logits; raises where it is over 1e-5."""
    expected = made(kind)[-1]
    errors = [
        np.abs(np.array(row) - expected[b, begin : begin + len(row)]).max()
        for b, (row, begin) in enumerate(zip(logits, begins, strict=False))
        if row
    ]
    assert max(errors) < 1e-5, errors
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_uncached_forward(kind, record_property):
    """Rows of different lengths, with different counts in each call, until the ring buffers have wrapped many times."""
    rng, counts, length_B = np.random.default_rng(1), [], np.zeros(3, int)
    while (length_B < T).any():
        # A row that has all of its tokens cannot stand still: calls are made of at least one token a row.
        count_B = np.minimum(rng.integers(1, AHEAD + 1, 3), T - length_B)
        if (count_B == 0).any():
            break
        counts.append(count_B)
        length_B += count_B
    logits, cache = read(kind, counts)
    record_property("error", float(compared(kind, logits)))
    assert np.asarray(cache.length_B).tolist() == length_B.tolist()


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_chunking_gives_the_same(data):
    kind = data.draw(st.sampled_from(["windows", "learned", "experts"]))
    counts = data.draw(st.lists(st.lists(st.integers(1, AHEAD), min_size=3, max_size=3), min_size=1, max_size=6))
    logits, _ = read(kind, counts)
    compared(kind, logits)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_tokens_can_be_taken_back(data):
    """Discarded tokens of a piece can be overwritten, and are not attended to."""
    kind = data.draw(st.sampled_from(["windows", "grouped", "rotary"]))
    model, _, extend, _, _ = made(kind)
    cache = models.init_cache(model, 3, T, AHEAD, "float32")
    logits = [[] for _ in range(3)]
    for _ in range(data.draw(st.integers(1, 6))):
        kept_B = data.draw(st.lists(st.integers(0, AHEAD), min_size=3, max_size=3))
        before_B = np.asarray(cache.length_B)
        if max(before_B) + AHEAD > T:
            break
        ids_BT = made(kind)[3]
        piece_BT = np.array([ids_BT[b, n : n + AHEAD] for b, n in enumerate(before_B)])
        for b, n in enumerate(kept_B):
            piece_BT[b, n:] = (piece_BT[b, n:] + 1) % V  # tokens that will be taken back
        logits_BTV, cache = extend(piece_BT, cache, np.full(3, AHEAD, np.int32))
        cache = cache._replace(length_B=jnp.asarray(before_B + kept_B, jnp.int32))
        for b, n in enumerate(kept_B):
            logits[b].extend(np.asarray(logits_BTV[b, :n]))
    if any(logits):
        compared(kind, logits)


@pytest.mark.slow
def test_windows_take_no_more_memory_than_they_need():
    model = made("windows")[0]
    cache = models.init_cache(model, 2, T, AHEAD, "bfloat16")
    assert [layer.k_BGSK.shape for layer in cache.layers] == [(2, 4, S, 4) for S in (3 + AHEAD - 1, T, 7 + AHEAD - 1)]
    assert cache.layers[0].v_BGSK.dtype == jnp.bfloat16
    # One slot fewer, and a token that can still be read is written over.
    small = jax.tree.map(lambda x: x[:, :, :-1] if x.ndim == 4 and x.shape[2] < T else x, cache)
    small = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim == 4 else x, small)
    counts = [[AHEAD] * 2] * 4
    with pytest.raises(AssertionError):
        compared("windows", read("windows", counts, cache=small)[0])
    whole = models.init_cache(model, 2, T, AHEAD, "float32")
    compared("windows", read("windows", counts, cache=whole)[0])


def test_rows_can_be_taken():
    """Rows taken in another order, one of them twice, continue as the original ones."""
    _, cache = read("windows", [[8, 3, 5], [2, 8, 8], [8, 8, 1]])
    rows = [2, 0, 2, 1]
    cache = caches.take_rows(cache, jnp.array(rows))
    _, _, extend, ids_BT, expected = made("windows")
    begins = np.asarray(cache.length_B)
    assert begins.tolist() == [14, 18, 14, 19]
    piece_BT = np.array([ids_BT[row, begin : begin + AHEAD] for row, begin in zip(rows, begins, strict=True)])
    logits_BTV, _ = extend(piece_BT, cache, np.full(4, AHEAD, np.int32))
    for row, begin, result in zip(rows, begins, np.asarray(logits_BTV), strict=True):
        np.testing.assert_allclose(result, expected[row, begin : begin + AHEAD], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [1, 5, 16, 30])
def test_a_row_read_alone_is_put_beside_others(prompt):
    """Prefill uses longer pieces than the batch, and so more slots for a window."""
    model, _, extend, ids_BT, _ = made("windows")
    single = models.init_cache(model, 1, T, 16, "float32")
    for begin in range(0, prompt, 16):
        n = min(16, prompt - begin)
        piece_1T = np.zeros((1, 16), np.int32)
        piece_1T[0, :n] = ids_BT[1, begin : begin + n]
        _, single = extend(piece_1T, single, np.array([n], np.int32))
    _, cache = read("windows", [[7, 8, 5], [2, 8, 8]], ahead=AHEAD)
    before = jax.tree.map(np.asarray, cache)
    cache = caches.put(cache, 1, single)
    assert np.asarray(cache.length_B).tolist() == [9, prompt, 13]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(np.delete(old, 1, 0), np.delete(np.asarray(new), 1, 0))
    logits, _ = read("windows", [[8, 8, 8]], cache=cache)
    compared("windows", logits, (9, prompt, 13))


@pytest.mark.slow
def test_scanned_layers_must_be_unrolled():
    model = models.build(tiny_config(**BASE | KINDS["scanned"]).model)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    cache = models.init_cache(model, 1, T, 1, "float32")
    with pytest.raises(ValueError, match="unroll them first"):
        models.extend(model, params, np.zeros((1, 1), np.int32), cache)
