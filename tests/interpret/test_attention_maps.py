"""Attention maps against attention in NumPy, with windows, prefixes and packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from written_out import IDS, made, written_out

from gptjax.config.errors import ConfigError
from gptjax.interpret import attention
from gptjax.models.kernels import reference


def test_maps_are_the_formulas():
    model, params = made()
    expected = written_out(params, IDS)
    np.testing.assert_allclose(
        attention.maps(model, params, IDS), [expected["weights_0"], expected["weights_1"]], atol=2e-4
    )


def test_windows_segments_and_encoders_show_in_the_maps():
    model, params = made(model_windows=(3, 0))
    segments_BT = jnp.array([[1] * 4 + [2] * 5] * 2)
    maps = np.asarray(attention.maps(model, params, IDS, segments_BT=segments_BT))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert (maps[..., 4:, :4] == 0).all() and (maps[0, ..., 8, :6] == 0).all() and (maps[1, ..., 8, 4:] > 0).all()
    model, params = made(model_arch="encoder")
    assert (np.asarray(attention.maps(model, params, IDS)) > 0).all(), "each token reads the whole text"


def test_a_prefix_takes_its_part():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 4, 2, 8)).astype("f")
    prefix = reference.Prefix(jnp.ones((3, 2, 8)), jnp.ones((3, 2, 8)))
    weights = reference.self_attention_weights(q, k, reference.AttentionSpec(prefix=prefix))
    alone = reference.self_attention_weights(q, k, reference.AttentionSpec())
    assert (weights.sum(-1) < 1).all()
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), alone, atol=1e-5)


def test_what_has_no_such_maps_says_so():
    model, params = made(model_arch="recurrent", model_positions="none")
    with pytest.raises(ConfigError, match="decoder or an encoder"):
        attention.maps(model, params, IDS)
