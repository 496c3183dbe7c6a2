"""Kernels for CPU against the reference implementations, which JAX differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close, compare, normal
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax import models
from gptjax.models.kernels import KERNELS, cpu, reference
from gptjax.models.kernels.reference import AttentionSpec
from gptjax.models.layers import ACTIVATIONS, GATES
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs
from gptjax.training import loop


@settings(max_examples=3, deadline=None)
@given(
    D=st.integers(2, 40),
    rows=st.integers(1, 9),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    centre=st.booleans(),
    seed=st.integers(0, 99),
)
@example(D=7, rows=3, scale=1.0, centre=True, seed=0)
@example(D=8, rows=1, scale=100.0, centre=False, seed=1)
def test_standardise_vs_reference(D, rows, scale, centre, seed):
    rng = np.random.default_rng(seed)
    x, gain = normal(rng, 2, rows, D, scale=scale) + scale, normal(rng, D)
    actual, expected = (lambda x, gain, f=f: f(x, gain, 1e-5, centre) for f in (cpu.normalize, reference.normalize))
    compare(actual, expected, x, gain)


def test_activations_are_the_functions_themselves():
    x = normal(np.random.default_rng(0), 7, 33, scale=3)
    for name, f in (ACTIVATIONS | GATES).items():
        compare(KERNELS["cpu"].activate(f), f, x)
        assert KERNELS["plain"].activate(f) is f, name


def inputs(seed, B, T, G, share, K=6, dtype="float32"):
    """Queries, keys and values."""
    rng = np.random.default_rng(seed)
    heads = (G * share, G, G)
    return tuple(normal(rng, B, T, H, K, dtype=dtype) for H in heads)


def slopes(H):
    return jnp.asarray(0.1 * np.arange(1, H + 1), jnp.float32)


# Uneven blocks, one block, and one token; windows shorter and longer than a block and than the sequence.
@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 5, 64, 129, 200, 300]),
    G=st.integers(1, 2),
    share=st.integers(1, 3),
    window=st.sampled_from([0, 1, 7, 70, 150, 400]),
    scale=st.sampled_from([None, 1.0]),
    alibi=st.booleans(),
    seed=st.integers(0, 99),
)
@example(B=2, T=300, G=2, share=3, window=0, scale=None, alibi=True, seed=0)
@example(B=1, T=300, G=1, share=2, window=70, scale=1.0, alibi=False, seed=1)
@example(B=1, T=129, G=2, share=1, window=7, scale=None, alibi=False, seed=2)
def test_attention_vs_reference(B, T, G, share, window, scale, alibi, seed):
    causal = AttentionSpec(window, scale, slopes(G * share) if alibi else None)
    compare(
        lambda q, k, v: cpu.attend(q, k, v, causal),
        lambda q, k, v: reference.attend(q, k, v, causal),
        *inputs(seed, B, T, G, share),
    )


# Documents shorter and longer than a block, in more than one of them, and of one token.
@settings(max_examples=4, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.sampled_from([1, 9, 129, 200, 300]),
    G=st.integers(1, 2),
    share=st.integers(1, 3),
    window=st.sampled_from([0, 1, 7, 150]),
    documents=st.integers(1, 30),
    alibi=st.booleans(),
    seed=st.integers(0, 99),
)
@example(B=2, T=300, G=2, share=2, window=70, documents=5, alibi=True, seed=0)
def test_attention_in_segments_vs_reference(B, T, G, share, window, documents, alibi, seed):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, documents + 1, (B, T)).astype("i"))
    segments[0, rng.integers(1, T + 1) :] = 0  # padding
    causal = AttentionSpec(window, None, slopes(G * share) if alibi else None, segments_BT=segments)
    compare(
        lambda q, k, v: cpu.attend(q, k, v, causal),
        lambda q, k, v: reference.attend(q, k, v, causal),
        *inputs(seed, B, T, G, share),
    )


def test_attention_in_bfloat16_vs_reference_in_float32():
    low = inputs(0, 2, 200, 2, 2, K=16, dtype="bfloat16")
    causal = AttentionSpec(70)

    def gradients(f, *arguments):
        out, pull = jax.vjp(lambda *given: f(*given, causal), *arguments)
        return out, *pull(out)

    actual = jax.jit(lambda *given: gradients(cpu.attend, *given))(*low)
    exact = jax.jit(lambda *given: gradients(reference.attend, *given))(*(x.astype("float32") for x in low))
    for mine, their in zip(actual, exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        close(mine, their, 0.03)


@pytest.mark.parametrize("T", [1, 5, 128, 129, 200, 300, 1000])
@pytest.mark.parametrize("window", [0, 1, 70, 2000])
def test_blocks_cover_the_sequence_and_hold_the_keys_that_they_see(T, window):
    spans = cpu.spans(T, window)
    assert [t for span in spans for t in range(span.first, span.end)] == list(range(T))
    assert len(spans) == 1 if T <= 128 else 2 <= len(spans) <= 4
    for span in spans:
        assert span.key == (max(0, span.first - window + 1) if window else 0)


def test_long_attention_does_less_than_the_square():
    q, k, v = inputs(0, 1, 512, 1, 1, K=64)

    def flops(f):
        return jax.jit(lambda *given: f(*given, AttentionSpec())).lower(q, k, v).compile().cost_analysis()["flops"]

    assert flops(cpu.attend) < 0.8 * flops(reference.attend)


@pytest.mark.parametrize(
    "causal",
    [AttentionSpec(drop=lambda weights: 2 * weights), AttentionSpec(window=jnp.array(3))],
    ids=["dropout", "scanned"],
)
def test_what_blocks_cannot_is_computed_plainly(causal):
    given = inputs(0, 1, 9, 1, 2)
    np.testing.assert_array_equal(cpu.attend(*given, causal), reference.attend(*given, causal))


def test_the_plan_tells_of_dropout():
    def output(packed=False, **changes):
        config = configs.resolve(tiny_config(model_kernels="cpu", **changes)).model
        return models.kernels.attention_plan(config, "float32", packed)

    assert output() == output(packed=True) == "in blocks of queries, with a custom gradient"
    assert output(model_scan_layers=True, model_layers=2).startswith("in blocks")
    assert "different lengths" in output(model_scan_layers=True, model_windows="(4, 0)")
    assert output(model_dropout=0.1) == "plain: dropout of attention weights is drawn by JAX (model.dropout)"


MODERN = dict(
    model_positions="rotary", model_norm="rmsnorm", model_activation="relu2", model_qk_norm="head",
    model_windows="(3,0)", model_value_residual=True, model_logit_softcap=15.0, model_tied_head=False, model_kv_heads=1,
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes, context",
    [
        ({}, 150),
        (MODERN, 16),
        (dict(model_positions="alibi", model_scan_layers=True, model_remat="full"), 16),
    ],
    ids=["base", "modern", "scanned and rematerialized"],
)
def test_a_model_of_either_kernels_has_one_loss_and_one_gradient(changes, context):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 257, (2, context + 1))
    weights = rng.integers(0, 3, (2, context)).astype("f")
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": weights}

    def run(kernels):
        config = configs.with_vocabulary(
            tiny_config(model_kernels=kernels, model_context=context, **changes), 257
        ).model
        model = models.build(config)
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), models.shapes(model))
        return jax.jit(jax.value_and_grad(lambda params: causal(model)(params, batch, None)[0]))(params)

    (loss, grads), (their_loss, their_grads) = run("cpu"), run("plain")
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    jax.tree.map(lambda mine, their: close(mine, their, 1e-4), grads, their_grads)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "windows, scan_layers, known", [("(3,0)", False, True), ("(3,3)", True, True), ("(3,0)", True, False)]
)
def test_kernels_know_the_window_unless_scanned_layers_differ(monkeypatch, remat, windows, scan_layers, known):
    seen = []

    def attend(q, k, v, causal):
        seen.append(isinstance(causal.window, int))
        return reference.attend(q, k, v, causal)

    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cpu"]._replace(attend=attend))
    config = tiny_config(
        model_kernels="cpu", model_remat=remat, model_windows=windows, model_scan_layers=scan_layers
    )  # fmt: skip
    models.shapes(models.build(configs.with_vocabulary(config, 257).model))
    assert seen and set(seen) == {known}


@pytest.mark.slow
def test_two_hundred_steps_end_at_the_same_loss(tmp_path, text_file):
    losses = []
    for kernels in ("plain", "cpu"):
        config = tiny_config(
            data_path=text_file, train_steps=200, eval_every_steps=200, checkpoint_every_steps=200,
            optimizer_learning_rate=0.01, model_kernels=kernels, model_layers=1,
        )  # fmt: skip
        losses.append(loop.train(config, tmp_path / kernels)["val_loss"])
    assert losses[0] < 3 and abs(losses[0] - losses[1]) < 1e-3
