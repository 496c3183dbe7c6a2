"""Non-finite numbers planted at a place are located there, with any layout of the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import models
from gptjax.models.stacking import stack
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs
from gptjax.training import nonfinite

IDS = np.arange(2 * 17).reshape(2, 17)
BATCH = {"inputs_BT": IDS[:, :-1], "targets_BT": IDS[:, 1:], "weights_BT": np.ones((2, 16), "f")}
WAYS = [dict(), dict(model_scan_layers=True, model_remat="full"), dict(model_remat="dots", model_dropout=0.1)]


def found(change, spoil=lambda grads: grads, **changes):
    """Returns the finding after `change(params by block)` and `spoil(gradient by block)`."""
    config = configs.with_vocabulary(tiny_config(**changes), 257)
    scanned, dropout = config.model.scan_layers, config.model.dropout
    plain = nonfinite.unrolled_model(config)
    made = jax.jit(lambda: plain.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))()["params"]
    params = jax.tree.map(np.array, made)
    change(params)
    rng = jax.random.key(1) if dropout else None
    objective = causal(models.build(config.model))

    def gradient(params, batch):
        grads = jax.grad(lambda params: objective(params, batch, rng)[0])(params)
        return spoil(grads)

    return nonfinite.find_first(config, stack(params) if scanned else params, BATCH, rng, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("changes", WAYS)
def test_an_overflow_is_located_in_its_module(changes):
    def change(params):
        kernel = params["block_1"]["mlp"]["up"]["kernel"]
        kernel[:] = 3e38 * np.sign(kernel)

    assert found(change, **changes) == ("activation", "block_1/mlp/up")


def test_an_overflow_between_modules_is_located_at_the_next_input():
    def change(params):
        params["block_1"]["mlp"]["up"]["kernel"] *= 1e22  # relu2 squares what comes of it

    assert found(change, model_activation="relu2").where == "the input of block_1/mlp/down"


@pytest.mark.parametrize("changes", WAYS[:2])
def test_a_parameter_is_reported_before_its_consequences(changes):
    def change(params):
        params["block_1"]["attention"]["qkv"]["kernel"][0, 0] = np.nan

    finding = found(change, **changes)
    assert finding == ("parameter", "block_1/attention/qkv/kernel") and "is not finite" in str(finding)


def test_a_loss_of_finite_activations_is_reported_as_such():
    def change(params):
        params["tokens"]["embedding"] *= 1e11  # normed at once, but large in the tied head
        params["final_norm"]["scale"] *= 1e30

    assert found(change).what == "loss"


@pytest.mark.slow
def test_the_first_gradient_in_backward_order_is_reported():
    def spoil(grads):
        for name in ("tokens", "block_0"):
            grads[name] = jax.tree.map(lambda leaf: leaf * jnp.nan, grads[name])
        grads["block_1"]["attention"]["qkv"]["kernel"] *= jnp.inf
        return grads

    assert found(lambda params: None, spoil) == ("gradient", "block_1/attention/qkv/kernel")
    assert found(lambda params: None).what == "nothing"
