"""Contributions sum to the logit, and a head's equals its output, normalized and multiplied, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from written_out import IDS, made, written_out

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import direct_logits

TOKENS = (IDS + 50) % 257
KINDS = {
    "plain": dict(),
    "biased": dict(model_use_bias=True, model_head_bias=True, model_tied_head=False, model_logit_scale=0.5),
    "rms": dict(model_norm="rmsnorm", model_positions="rotary", model_activation="swiglu", model_kv_heads=1),
    "experts": dict(model_mlp="experts", model_experts=4, model_scan_layers=True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_add_up_to_the_logit(kind):
    model, params = made(**KINDS[kind])
    result = direct_logits.attribution(model, params, IDS, TOKENS)
    logits_BTV = models.logits(model, params, IDS)
    expected = np.take_along_axis(np.asarray(logits_BTV), TOKENS[..., None], -1)[..., 0]
    np.testing.assert_allclose(sum(result.values()), expected, atol=2e-3, rtol=1e-3)
    assert list(result) == [
        "embedding",
        *[f"block_{i}/{part}" for i in range(2) for part in ("head_0", "head_1", "attention", "mlp")],
        "biases",
    ]


def test_a_head_has_what_it_writes():
    model, params = made()
    activations = written_out(params, IDS)
    written = (
        activations["block_1/attention/out.in"][..., :8]
        @ np.asarray(params["block_1"]["attention"]["out"]["kernel"])[:8]
    )
    std = np.sqrt(activations["block_1"].var(-1, keepdims=True) + 1e-5)
    row = np.asarray(params["tokens"]["embedding"])[TOKENS] * np.asarray(params["final_norm"]["scale"])
    expected = ((written - written.mean(-1, keepdims=True)) / std * row).sum(-1)
    result = direct_logits.attribution(model, params, IDS, TOKENS)["block_1/head_0"]
    np.testing.assert_allclose(result, expected, atol=1e-3, rtol=1e-3)


def test_norms_behind_sublayers_are_refused():
    model, params = made(model_norm_position="post")
    with pytest.raises(ConfigError, match="pre-norm blocks"):
        direct_logits.components(model, params, jnp.asarray(IDS))
