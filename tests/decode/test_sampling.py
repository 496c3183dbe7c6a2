"""Sampling: the filtered distribution against transformers, draws against the distribution, rows against neighbours."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_RUN
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.decode import sampling
from gptjax.decode.penalties import History
from gptjax.decode.settings import SMALL_TOP_K, SamplingParams, batched, used

GOLDEN = Path(__file__).parents[1] / "golden"
NEUTRAL = SamplingParams(temperature=1.0, top_k=0)
process = jax.jit(sampling.process_logits, static_argnums=(3, 4))
draw = jax.jit(sampling.sample, static_argnums=3)


@pytest.fixture(scope="module")
def hf():
    """tests/golden/make_sampling.py, which asks transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return maker()


def maker():
    spec = importlib.util.spec_from_file_location("make_sampling", GOLDEN / "make_sampling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process_rows(logits, rows, ids=None, lengths=None, prompts=None, ends=(), kinds=None):
    B = len(logits)
    history = History(np.zeros((B, 1), np.int32) if ids is None else ids, lengths, prompts)
    if ids is None:
        history = History(history.ids_BS, np.zeros(B, np.int32), np.zeros(B, np.int32))
    return np.asarray(process(jnp.asarray(logits), batched(rows, biases=4), history, kinds or used(rows), ends))


def assert_same(found, expected):
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_processed_vs_golden_transformers():
    """All rows in one batch, each with settings of its own."""
    golden = np.load(GOLDEN / "sampling.npz")
    rows = [
        NEUTRAL._replace(**{**case, "logit_bias": {int(k): v for k, v in case.get("logit_bias", {}).items()}})
        for case in json.loads(str(golden["settings"]))
    ]
    ends = tuple(int(end) for end in golden["ends"])
    found = process_rows(golden["logits"], rows, golden["ids"], golden["lengths"], golden["prompts"], ends)
    assert_same(found, golden["expected"])


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.05, 0.7, 1.0, 3.0]),
        "top_k": st.integers(0, 45),
        "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([1e-6, 0.1, 0.5, 0.99]),
        "typical_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999]),
        "repetition_penalty": st.sampled_from([0.5, 1.2, 3.0]),
        "no_repeat_ngram": st.integers(0, 4),
        "logit_bias": st.dictionaries(st.integers(0, 39), st.sampled_from([-100.0, -1.0, 2.0]), max_size=4),
        "min_tokens": st.integers(0, 15),
    },
)
KINDS = used([SamplingParams(9, 0.5, 500, 0.5, 0.5, 0.5, 2, 1, 1, 2, {1: 2.0}, 3), SamplingParams(temperature=0)])


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(CHANGES, min_size=4, max_size=4), seed=st.integers(0, 999))
def test_processed_vs_transformers(hf, changes, seed):
    """One program for all settings; that of a row's own kinds gives the same, as is tested below."""
    logits, ids, lengths, prompts = hf.rows(seed, 4)
    rows = [NEUTRAL._replace(**change) for change in changes]
    found = process_rows(logits, rows, ids, lengths, prompts, hf.ENDS, KINDS)
    for b in range(4):
        assert_same(found[b], hf.processed(logits[b], ids[b, : lengths[b]], prompts[b], changes[b]))


@settings(max_examples=40, deadline=None)
@given(
    change=st.sampled_from([{"top_k": k} for k in (1, 2, 5, 39, 40, 41)] + [{"min_p": p} for p in (0.01, 0.3, 0.9)]
                           + [{"typical_p": p} for p in (0.05, 0.3, 0.6, 0.9)]),
    equals=st.integers(1, 4),
    banned=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_filters_vs_transformers_where_logits_are_equal(hf, change, equals, banned, seed):
    logits = np.random.default_rng(seed).integers(0, equals, (1, 40)).astype(np.float32)
    logits[0, :7] = -np.inf if banned else -0.0
    found = process_rows(logits, [NEUTRAL._replace(**change)])
    assert_same(found[0], hf.processed(logits[0], [1], 1, change))


@settings(max_examples=30, deadline=None)
@given(p=st.sampled_from([0.05, 0.33, 0.8, 0.95]), equals=st.integers(2, 6), seed=st.integers(0, 99))
def test_top_p_keeps_all_that_equal_the_last(hf, p, equals, seed):
    """Transformers keeps some of the ties, which depends on its sort; the rest is the same."""
    logits = np.random.default_rng(seed).integers(0, equals, (1, 40)).astype(np.float32)
    found = process_rows(logits, [NEUTRAL._replace(top_p=p)])[0]
    expected = hf.processed(logits[0], [1], 1, {"top_p": p})
    least = expected[np.isfinite(expected)].min()
    np.testing.assert_array_equal(np.isfinite(found), logits[0] >= least)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 200), seed=st.integers(0, 99))
@example(k=SMALL_TOP_K, seed=0)
def test_both_implementations_of_top_k_agree(k, seed):
    logits = np.random.default_rng(seed).normal(size=(1, 150)).round(1).astype(np.float32)
    found = np.isfinite(sampling.top_k(jnp.array(logits), jnp.array([k])))
    np.testing.assert_array_equal(found, logits >= np.sort(logits)[:, -min(k, 150)])
    if k <= SMALL_TOP_K:
        np.testing.assert_array_equal(found, np.isfinite(sampling.small_top_k(jnp.array(logits), jnp.array([k]))))


def test_cutoff_is_exact_over_all_sizes_of_floats():
    """A plain walk through the sorted values, signs, zeros, infinities and subnormal sizes included."""
    values = np.float32([-np.inf, -1e38, -3.5, -1.0, -1e-30, 0.0, 1e-30, 0.5, np.nextafter(0.5, 1, dtype="f"), 7e37])
    shuffled = np.random.default_rng(0).permutation(len(values))
    for reached in range(1, len(values) + 1):
        found = sampling.cutoff(jnp.array(values[shuffled])[None], jnp.ones((1, len(values))), jnp.array([reached]))
        assert found[0, 0] == values[reached - 1]


def test_a_greedy_row_is_left_unfiltered():
    logits = np.random.default_rng(0).normal(size=(2, 90)).astype(np.float32)
    found = process_rows(logits, [SamplingParams(temperature=0, top_k=3), SamplingParams(top_p=0.5)])
    np.testing.assert_array_equal(found[0], logits[0])
    assert np.isfinite(found[1]).sum() < 50


@pytest.mark.parametrize("V", [5, 300])
def test_samples_follow_the_processed_distribution(V):
    """Also where there are more ids than lanes."""
    B = 20_000
    logits = np.full(V, -20, np.float32)
    likely = np.random.default_rng(0).choice(V, 5, replace=False)
    logits[likely] = [1.0, 2.0, 0.0, -1.0, 1.5]
    processed = jnp.asarray(process_rows(logits[None], [SamplingParams(temperature=0.7, top_k=4)]))
    ids = draw(jnp.broadcast_to(processed, (B, V)), jax.random.split(jax.random.key(0), B), jnp.full(B, 0.7))
    kept = likely[[0, 1, 2, 4]]
    weights = np.exp(logits[kept] / 0.7)
    expected, counts = weights / weights.sum() * B, np.bincount(ids, minlength=V)
    assert counts[kept].sum() == B
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 16.3  # three degrees of freedom, p = 0.001


def test_temperature_zero_selects_the_first_of_ties():
    logits = jnp.array([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 9.0]])
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 2)
        assert draw(logits, keys, jnp.zeros(2)).tolist() == [1, 3]
        assert draw(logits, keys, jnp.zeros(2), frozenset({"greedy"})).tolist() == [1, 3]


def test_keys_determine_samples():
    logits, warm = jnp.zeros((8, 997)), jnp.ones(8)
    same, other = jnp.stack([jax.random.key(1)] * 8), jax.random.split(jax.random.key(2), 8)
    assert len(set(draw(logits, same, warm).tolist())) == 1
    assert len(set(draw(logits, other, warm).tolist())) > 5


def rows_alone_and_together(V):
    """Processed logits, ids, log-probabilities and alternatives of 16 rows: together, and one or three at a time."""
    rng = np.random.default_rng(0)
    rows = [SamplingParams(), SamplingParams(temperature=0), NEUTRAL, SamplingParams(temperature=1.3, top_k=0,
    top_p=0.9),
            SamplingParams(top_k=SMALL_TOP_K + 9, typical_p=0.7), SamplingParams(min_p=0.1, repetition_penalty=1.3),
            SamplingParams(frequency_penalty=0.3, presence_penalty=0.2, logit_bias={3: 2.0}),
            SamplingParams(no_repeat_ngram=2, min_tokens=9)] * 2  # fmt: skip
    logits = 3 * rng.normal(size=(16, V)).astype(np.float32)
    length = rng.integers(5, 12, 16)
    history = History(rng.integers(0, 9, (16, 12)).astype(np.int32), length, length // 2)
    keys = jax.random.split(jax.random.key(0), 16)

    @jax.jit
    def alternatives(logits):
        return sampling.alternatives(logits, 7)

    def all_of(at):
        some, kinds = [rows[b] for b in at], used([rows[b] for b in at])
        processed = process(logits[at], batched(some), jax.tree.map(lambda x: x[at], history), kinds, (1,))
        ids = draw(processed, keys[at], batched(some).temperature_B, kinds)
        return jax.device_get((processed, ids, jax.jit(sampling.logprobs)(logits[at], ids), alternatives(logits[at])))

    together = all_of(np.arange(16))
    for at in [[b] for b in range(8)] + [[13, 0, 7]]:
        for alone, among in zip(jax.tree.leaves(all_of(np.array(at))), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(alone, among[at])


@pytest.mark.slow
def test_rows_are_independent():
    """Bit for bit: distribution, draw and log-probabilities."""
    rows_alone_and_together(1031)


@pytest.mark.slow
def test_rows_are_independent_in_optimised_programs():
    """The same as a user's programs are compiled, at GPT-2's vocabulary."""
    environment = os.environ | AS_USERS_RUN
    code = "import conftest, test_sampling; test_sampling.rows_alone_and_together(50257)"
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_log_probabilities_are_of_the_models_own_distribution():
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    expected = np.asarray(jax.nn.log_softmax(logits))
    ids, logprobs = sampling.alternatives(jnp.array(logits), 4)
    np.testing.assert_array_equal(ids, np.argsort(-logits)[:, :4])
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, np.asarray(ids), 1), atol=1e-6)
    chosen = jnp.array([5, 0, 39])
    np.testing.assert_allclose(sampling.logprobs(jnp.array(logits), chosen), expected[range(3), chosen], atol=1e-6)
