"""The logit lens against a norm and a product in NumPy; per-token loss against the objective's."""

import jax
import numpy as np
import pytest
from written_out import IDS, made, normed, written_out

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import lens
from gptjax.objectives.causal import causal


def test_the_lens_is_norm_and_head_of_the_stream():
    model, params = made()
    activations, table_VD = written_out(params, IDS), np.asarray(params["tokens"]["embedding"])
    stream = [activations[name] for name in ("block_0.in", "block_0", "block_1")]
    expected = [normed(x, {"scale": np.asarray(params["final_norm"]["scale"])}) @ table_VD.T for x in stream]
    result = lens.logit_lens(model, params, IDS)
    np.testing.assert_allclose(result, expected, atol=2e-3, rtol=2e-3)
    best = lens.top_predictions(result[:, 0])
    assert best.tokens_LT.tolist() == np.argmax([row[0] for row in expected], -1).tolist()
    assert best.probabilities_LT.shape == (3, 9)


@pytest.mark.parametrize(
    "changes", [dict(model_norm_position="post"), dict(model_arch="encoder", model_head_transform=True)]
)
def test_the_last_is_what_the_model_says(changes):
    model, params = made(**changes)
    np.testing.assert_allclose(
        lens.logit_lens(model, params, IDS)[-1], models.logits(model, params, IDS), atol=1e-3, rtol=1e-3
    )


def test_token_losses_add_up_to_the_objective():
    model, params = made()
    batch = {"inputs_BT": IDS[:, :-1], "targets_BT": IDS[:, 1:], "weights_BT": np.ones((2, 8), "f")}
    result = lens.token_loss(model, params, IDS)
    assert result.shape == (2, 8)
    np.testing.assert_allclose(result.sum(), causal(model)(params, batch, None)[0], rtol=1e-5)


def test_what_has_no_blocks_is_refused():
    model, params = made(model_arch="recurrent", model_positions="none")
    with pytest.raises(ConfigError, match="made of blocks"):
        lens.logit_lens(model, params, jax.numpy.asarray(IDS))
