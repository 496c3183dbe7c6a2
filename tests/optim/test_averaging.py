"""Exponential moving average of the parameters against NumPy, and without it."""

import json

import jax
import numpy as np
import pytest
from conftest import BASE, plan, tiny_config

from gptjax import optim

SHAPES = {"up/kernel": (3, 5), "norm/scale": (4,)}


def trees(count):
    rng = np.random.default_rng(0)
    return [
        {"block_0": {name: rng.normal(size=shape).astype("f") for name, shape in SHAPES.items()}} for _ in range(count)
    ]


def config_of(**changes):
    settings = dict(optimizer_learning_rate=0.1, schedule_name="constant", schedule_warmup_steps=0)
    return tiny_config(**settings | changes)


@pytest.mark.parametrize("longest", [0.3, 0.999])
def test_ema_vs_reference(longest):
    """Equals TensorFlow's ExponentialMovingAverage with num_updates, in float64; updates are unchanged."""
    start, *gradients = trees(16)
    alone, beside = optim.optimizer(config_of()), optim.optimizer(config_of(optimizer_ema=longest))
    params, state, other = start, beside.init(start), alone.init(start)
    wanted = jax.tree.map(lambda p: p.astype(np.float64), start)
    decays = set()
    for t, grads in enumerate(gradients):
        updates, state = beside.update(grads, state, params)
        plain, other = alone.update(grads, other, params)
        jax.tree.map(np.testing.assert_array_equal, updates, plain)
        params = jax.tree.map(np.add, params, updates)
        d = min(longest, (1 + t) / (10 + t))
        decays.add(d)
        wanted = jax.tree.map(lambda mean, p, d=d: d * mean + (1 - d) * p, wanted, params)
    assert len(decays) == (15 if longest > 0.9 else 4), "both sides of the minimum"
    answers = optim.eval_params(state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), answers, wanted)
    assert np.abs(answers["block_0"]["up/kernel"] - params["block_0"]["up/kernel"]).max() > 0.02
    assert optim.has_eval_params(jax.eval_shape(beside.init, start))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_has_no_mean_without_ema(name):
    start = trees(1)[0]
    state = jax.eval_shape(optim.optimizer(config_of(optimizer_name=name)).init, start)
    more = jax.eval_shape(optim.optimizer(config_of(optimizer_name=name, optimizer_ema=0.9)).init, start)
    assert jax.tree.structure(more.inner) == jax.tree.structure(state)
    assert len(jax.tree.leaves(more)) == len(jax.tree.leaves(state)) + 1 + len(SHAPES)
    assert not optim.has_eval_params(state) and optim.eval_params(state, start) is start


@pytest.mark.parametrize("flags", [["optimizer.ema=0.9"], ["optimizer.name=schedule_free"]])
def test_plans_count_averages(call, flags):
    small = ["model.layers=1", "model.width=16", "data.tokenizer=bytes"]
    plans = [
        json.loads(
            call(plan, f"--config={BASE}", "--json", *(f"--config.{flag}" for flag in small + more)).out.splitlines()[
                -1
            ]
        )
        for more in ([], flags)
    ]
    assert plans[0]["parameters"] == plans[1]["parameters"]
