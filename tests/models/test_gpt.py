"""The decoder as a whole: what it may see, what it knows at first, what it can learn, how large it is."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from flax import linen as nn

from gptjax import config as configs
from gptjax import models
from gptjax.objectives.causal import causal, cross_entropy


def build(vocabulary=257, dtype="float32", **changes):
    config = configs.with_vocabulary(tiny_config(**changes), vocabulary)
    model = models.build(config.model, dtype)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.mark.parametrize("changes", [{}, {"model_kv_heads": 1}, {"model_use_bias": True, "model_tied_head": False}])
def test_causality_through_gradients(changes):
    model, params = build(**changes)
    table = params["tokens"]["embedding"]
    ids = jnp.arange(12)[None]

    def output_at(t, table_in):
        # The lookup alone is differentiated: a tied head reads the untouched table.
        shift = table_in - table

        def interceptor(next_method, args, kwargs, context):
            out = next_method(*args, **kwargs)
            at_lookup = context.module.name == "tokens" and context.method_name == "__call__"
            return out + shift[args[0]] if at_lookup else out

        with nn.intercept_methods(interceptor):
            return model.apply({"params": params}, ids)[0, t].sum()

    for t in (0, 5, 11):
        grad = np.abs(jax.grad(lambda e, t=t: output_at(t, e))(table)).sum(-1)[:12]
        assert (grad[: t + 1] > 0).all(), "each position sees itself and all before it"
        assert (grad[t + 1 :] == 0).all(), "no position sees a later one"


def test_a_new_model_knows_nothing():
    for vocabulary in (257, 5000):
        model, params = build(vocabulary, model_width=64)
        ids = jax.random.randint(jax.random.key(1), (8, 16), 0, vocabulary)
        targets = jax.random.randint(jax.random.key(2), (8, 16), 0, vocabulary)
        loss = cross_entropy(model.apply({"params": params}, ids), targets).mean()
        assert abs(float(loss) / math.log(vocabulary) - 1) < 0.02


def test_one_repeated_batch_is_learnt_by_heart():
    model, params = build(model_width=32)
    rng = np.random.default_rng(0)
    batch = {
        "inputs_BT": rng.integers(0, 257, (4, 16)),
        "targets_BT": rng.integers(0, 257, (4, 16)),
        "weights_BT": np.ones((4, 16), "f"),
    }
    objective, optimizer = causal(model), optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: objective(p, batch, None)[0] / 64)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(300):
        params, state, loss = step(params, state)
    assert float(loss) < 0.02


def test_gpt2_has_the_published_number_of_parameters():
    config = tiny_config(
        model_layers=12, model_heads=12, model_width=768, model_context=1024, model_use_bias=True, data_context=16
    )
    model = models.build(configs.with_vocabulary(config, 50257).model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(shapes)) == 124_439_808


def test_projections_to_the_residual_stream_start_smaller():
    _, params = build(model_width=128, model_layers=8)
    block = params["block_0"]
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    for part in (block["mlp"]["down"], block["attention"]["out"]):
        assert np.std(part["kernel"]) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


def test_bfloat16_is_close_to_float32_and_gives_float32_logits():
    model, params = build(model_width=64)
    low, _ = build(model_width=64, dtype="bfloat16")
    ids = jnp.arange(16)[None]
    exact, rounded = model.apply({"params": params}, ids), low.apply({"params": params}, ids)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.02


def test_dropout_acts_only_in_training_and_depends_on_its_key():
    model, params = build(model_dropout=0.5)
    ids = jnp.arange(16)[None]

    def run(seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, ids, deterministic=seed is None, rngs=rngs)

    np.testing.assert_array_equal(run(), run())
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2)) and not np.allclose(run(1), run())
