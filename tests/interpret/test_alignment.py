"""Alignment against attention in NumPy, and its plot."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.interpret import alignment
from gptjax.runs import config as configs
from gptjax.runs.run import Run

TOKENIZER = tokenizers.build("bytes", [])


def a_run(tmp_path, **changes):
    config = configs.with_vocabulary(tiny_config(**changes), TOKENIZER.n_vocab)
    model = models.build(config.model)
    return Run(tmp_path, config, model, models.init(model, jax.random.key(0)), TOKENIZER)


KINDS = {
    "transformer": dict(model_arch="seq2seq", model_init_std=0.5),
    "scanned": dict(model_arch="seq2seq", model_scan_layers=True),
    "lstm": dict(model_arch="seq2seq", model_encoder="lstm", model_decoder="lstm", model_positions="none"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.thorough
def test_each_written_token_spreads_its_attention_over_the_source(kind, tmp_path):
    run = a_run(tmp_path, **KINDS[kind])
    result = alignment.alignment(run, "a bé", "xy")
    layers, heads = (1, 1) if kind == "lstm" else (2, 2)
    assert result.weights_LHTS.shape == (layers, heads, 3, 6), "é is two bytes; the end is read, and written"
    assert result.source[:3] == ["a", " ", "b"] and (result.source[-1], result.target) == ("end", ["x", "y", "end"])
    np.testing.assert_allclose(result.weights_LHTS.sum(-1), 1, atol=1e-6)
    other = alignment.alignment(run, "a bé", "xz").weights_LHTS
    np.testing.assert_allclose(other[:, :, :2], result.weights_LHTS[:, :, :2], atol=1e-6)
    alignment.plot(result, tmp_path / "picture.png", each_layer=True)
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_weights_are_what_the_values_are_mixed_by(tmp_path):
    """The first layer's weights from its parameters: softmax(q k^T / sqrt(K))."""
    run = a_run(tmp_path, **KINDS["transformer"] | {"model_layers": 1})
    weights_HTS = alignment.alignment(run, "abc", "xy").weights_LHTS[0]
    activations = {}

    def look(call, args, kwargs, context):
        given = call(*args, **kwargs)
        if context.module.path[-2:] in (("cross", "q"), ("cross", "kv")):
            activations[context.module.path[-1]] = np.asarray(given)
        return given

    source = [*b"abc", TOKENIZER.end]
    with nn.intercept_methods(look):
        models.logits(
            run.model, run.params, np.array([[TOKENIZER.end, *b"xy"]]), np.array([source]), np.ones((1, 4), np.int32)
        )
    q_THK = activations["q"].reshape(3, 2, 8)
    k_SHK = activations["kv"].reshape(4, 2, 2, 8)[:, :, 0]
    scores_HTS = np.einsum("thk,shk->hts", q_THK, k_SHK) / np.sqrt(8)
    expected = np.exp(scores_HTS - scores_HTS.max(-1, keepdims=True))
    np.testing.assert_allclose(weights_HTS, expected / expected.sum(-1, keepdims=True), atol=1e-5)


def test_a_decoder_alone_looks_at_no_source(tmp_path):
    with pytest.raises(ConfigError, match="no encoder"):
        alignment.alignment(a_run(tmp_path), "a", "b")
