"""Vectors of a text, from those of its tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models.heads import POOLINGS

OF_TEXT = {"first": lambda x_TD: x_TD[0], "last": lambda x_TD: x_TD[-1], "mean": lambda x_TD: x_TD.mean(0)}


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_text_is_pooled_without_its_padding(name):
    rng = np.random.default_rng(0)
    x_BTD, lengths = rng.normal(size=(3, 5, 4)).astype("f"), np.array([5, 1, 3])
    real_BT = np.arange(5) < lengths[:, None]
    found = POOLINGS[name](jnp.asarray(x_BTD), jnp.asarray(real_BT))
    np.testing.assert_allclose(found, [OF_TEXT[name](x[:n]) for x, n in zip(x_BTD, lengths, strict=True)], rtol=1e-6)
