"""Products with transposed kernels for decoding, and a whole model with them, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import models
from gptjax.models.kernels import KERNELS, cpu_decode, reference
from gptjax.runs import config as configs


@settings(max_examples=8, deadline=None)
@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=2), D=st.integers(1, 40), F=st.integers(1, 40))
def test_product_and_head_vs_plain(rows, D, F):
    rng = np.random.default_rng(len(rows) + D + F)
    x, kernel_DF = rng.normal(size=(*rows, D)).astype("f"), rng.normal(size=(D, F)).astype("f")
    y = cpu_decode.product(jnp.array(x), jnp.array(kernel_DF.T), "float32", "float32")
    np.testing.assert_allclose(y, reference.product(jnp.array(x), kernel_DF, "float32", "float32"), atol=1e-5)
    logits = cpu_decode.unembed(jnp.array(x), jnp.array(kernel_DF.T), 3.0)
    np.testing.assert_allclose(logits, reference.unembed(jnp.array(x), jnp.array(kernel_DF.T), 3.0), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(model_tied_head=False, model_activation="swiglu", model_kv_heads=1),
        dict(model_mlp="experts", model_experts=4, model_scan_layers=True),
        dict(train_dtype="bfloat16", model_tied_head=False),
    ],
    ids=str,
)
@pytest.mark.thorough
def test_decoding_layout_gives_the_same_logits(changes):
    config = tiny_config(**changes, model_kernels="cpu").copy_and_resolve_references()
    with config.unlocked():
        config.model.vocabulary = 50
    model = models.build(config.model, config.train.dtype)
    ids_BT = np.random.default_rng(0).integers(0, 50, (2, 7))
    params = model.init(jax.random.key(0), jnp.asarray(ids_BT))["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    turned, stored = models.for_decoding(model, jax.tree.map(np.asarray, params))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stored))
    wanted = config.train.dtype == "float32"
    assert KERNELS[turned.config.kernels].transposed == wanted
    F, D = stored["block_0"]["attention"]["qkv"]["kernel"].shape
    assert (F > D) == wanted
    expected = models.logits(model, params, ids_BT)
    tolerance = 1e-5 if wanted else 0.05
    np.testing.assert_allclose(models.logits(turned, stored, ids_BT), expected, atol=tolerance)


def test_a_config_cannot_ask_for_them():
    with pytest.raises(configs.ConfigError, match=r"model\.kernels"):
        configs.check(tiny_config(model_kernels="cpu_decode"))
