"""Selection of cuDNN's attention, its arguments, and the reported reason for a fallback; runs without a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close, normal
from conftest import tiny_config

from gptjax.models import kernels
from gptjax.models.kernels import gpu, reference
from gptjax.models.kernels.reference import AttentionSpec
from gptjax.runs import config as configs

FITS = dict(head_width=64, dtype="bfloat16", positions="rotary", dropout=0.0)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes JAX report a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, ""),
        (dict(dtype=jnp.dtype("float16"), head_width=128, positions="learned"), ""),
        (dict(dtype="float32"), "takes bfloat16, not float32"),
        (dict(head_width=60), "a multiple of 8 up to 128, not 60"),
        (dict(head_width=136), "up to 128, not 136"),
        (dict(positions="alibi"), "ALiBi"),
        (dict(dropout=0.1), "model.dropout"),
        (dict(static_windows=False), "windows of different lengths"),
        (dict(packed=True), "packed documents"),
    ],
)
def test_each_refusal_says_why(on_gpu, changes, message):
    why = gpu.unsupported_reason(**FITS | changes)
    assert message in why and bool(message) == bool(why)


@pytest.mark.parametrize(
    "capabilities, widest", [(["8.0"], 128), (["9.0"], 256), (["10.0"], 256), (["9.0", "8.6"], 128)]
)
def test_the_oldest_device_bounds_the_heads_width(on_gpu, monkeypatch, capabilities, widest):
    class Device:
        def __init__(self, capability):
            self.compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Device(capability) for capability in capabilities])
    assert gpu.unsupported_reason(**FITS | dict(head_width=widest)) == ""
    assert f"up to {widest}" in gpu.unsupported_reason(**FITS | dict(head_width=widest + 8))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here is a GPU")
def test_without_a_gpu_plain_attention_computes_and_the_plan_says_so():
    q = normal(np.random.default_rng(0), 1, 4, 2, 8, dtype="bfloat16")
    np.testing.assert_array_equal(gpu.attend(q, q, q, AttentionSpec()), reference.attend(q, q, q, AttentionSpec()))
    assert plan() == "plain: no GPU is available"


def plan(dtype="bfloat16", packed=False, **changes):
    config = configs.resolve(tiny_config(model_kernels="gpu", model_head_width=8, **changes)).model
    return kernels.attention_plan(config, dtype, packed)


def test_the_plan_names_cudnn_or_what_keeps_it_away(on_gpu):
    assert plan() == "cuDNN's flash attention"
    assert plan("float32") == "plain: cuDNN's attention takes bfloat16, not float32 (train.dtype)"
    assert plan(model_positions="alibi").startswith("plain: ALiBi")
    assert plan(model_dropout=0.1).startswith("plain: dropout")
    assert plan(model_windows="(3,0)", model_scan_layers=True).startswith("plain: scanned layers")
    assert plan(packed=True).startswith("plain: packed documents")
    for changes in (dict(model_windows="(3,0)"), dict(model_windows="(3,3)", model_scan_layers=True)):
        assert plan(**changes) == "cuDNN's flash attention"


@pytest.mark.parametrize("backend, expected", [("cpu", "cpu"), ("gpu", "gpu"), ("tpu", "tpu")])
def test_each_platform_has_its_kernels(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert kernels.resolve_kernels("auto") == expected and kernels.resolve_kernels("plain") == "plain"


@pytest.fixture
def calls(on_gpu, monkeypatch):
    """Records the arguments of JAX's attention, which XLA computes instead of cuDNN."""
    seen, attention = [], jax.nn.dot_product_attention

    def instead(q, k, v, **settings):
        seen.append(settings)
        return attention(q, k, v, **settings | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return seen


@pytest.mark.parametrize("window, scale", [(0, None), (1, None), (5, 0.5), (99, None)])
def test_cudnn_is_selected_and_matches_reference(calls, window, scale):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, 13, heads, 8, dtype="bfloat16") for heads in (4, 2, 2))
    causal = AttentionSpec(window, scale)
    out = jax.jit(partial(gpu.attend, spec=causal))(q, k, v)
    (settings,) = calls
    assert settings.pop("implementation") == "cudnn" and settings.pop("is_causal") is True
    assert settings == {"scale": scale, "local_window_size": (window - 1, 0) if window else None}
    exact = reference.attend(*(x.astype("float32") for x in (q, k, v)), causal)
    assert out.dtype == jnp.bfloat16
    close(out, exact, 0.02)


@pytest.mark.parametrize(
    "dtype, causal",
    [
        ("float32", AttentionSpec()),
        ("bfloat16", AttentionSpec(slopes_H=jnp.array([0.5, 0.25]))),
        ("bfloat16", AttentionSpec(drop=lambda weights: 2 * weights)),
        ("bfloat16", AttentionSpec(window=jnp.array(3))),
        ("bfloat16", AttentionSpec(segments_BT=np.array([[1, 1, 2, 2, 2, 0]]))),
    ],
    ids=["float32", "alibi", "dropout", "scanned", "packed"],
)
def test_what_cudnn_cannot_is_computed_plainly(calls, dtype, causal):
    q, k, v = (normal(np.random.default_rng(seed), 1, 6, 2, 8, dtype=dtype) for seed in range(3))
    np.testing.assert_array_equal(gpu.attend(q, k, v, causal), reference.attend(q, k, v, causal))
    assert not calls
