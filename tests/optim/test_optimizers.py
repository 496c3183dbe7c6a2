"""Optimizer and schedules against the formulas, and against torch where it is installed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from gptjax import optim

SHAPES = {"kernel": (3, 4), "bias": (4,)}


def random_trees(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype("f") for name, shape in SHAPES.items()} for _ in range(count)]


def updated(config, params, gradients):
    optimizer = optim.optimizer(config)
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def config_of(**changes):
    settings = dict(optimizer_learning_rate=0.01, optimizer_clip_norm=1.0, schedule_warmup_steps=3, train_steps=20)
    return tiny_config(**settings | changes)


def test_decay_mask_does_not_depend_on_stacking():
    """By name: a stacked norm has two dimensions too."""
    kinds = {"scale": False, "bias": False, "first_value_share": False, "kernel": True, "embedding": True}
    for shape in ((4,), (3, 4), (2, 3, 4)):
        params = {"part": {name: jnp.ones(shape) for name in kinds}}
        assert optim.weight_decay_mask(params) == {"part": kinds}


def test_adamw_vs_reference():
    """Algorithm 2 of arXiv 1711.05101, with clipping by global norm before it and no decay on vectors."""
    config = config_of()
    start, *gradients = random_trees(9)
    params = {name: p.astype(np.float64) for name, p in start.items()}
    mean = {name: 0.0 for name in params}
    square = {name: 0.0 for name in params}
    c = config.optimizer
    for t, grads in enumerate(gradients, 1):
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        rate = 0.01 * min(1, (t - 1) / 3)
        if t > 3:
            rate = 0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 1 - 3) / (20 - 3))))
        for name, g in grads.items():
            clipped = g * min(1, 1 / norm)
            mean[name] = c.beta1 * mean[name] + (1 - c.beta1) * clipped
            square[name] = c.beta2 * square[name] + (1 - c.beta2) * clipped**2
            step = mean[name] / (1 - c.beta1**t) / (np.sqrt(square[name] / (1 - c.beta2**t)) + c.epsilon)
            decay = c.weight_decay if params[name].ndim >= 2 else 0.0
            params[name] = params[name] - rate * (step + decay * params[name])
    got = updated(config, start, gradients)
    for name, expected in params.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-6)


def test_adamw_vs_torch():
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    start, *gradients = random_trees(6)
    config = config_of(optimizer_clip_norm=0, schedule_name="constant", schedule_warmup_steps=0)
    ours = updated(config, start, gradients)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in start.items()}
    c = config.optimizer
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": c.weight_decay},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.epsilon)
    for grads in gradients:
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        peer.step()
    for name, p in theirs.items():
        np.testing.assert_allclose(ours[name], p.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_clipping_can_be_disabled():
    start, small, large = random_trees(3)
    gradients = [small, jax.tree.map(lambda g: 100 * g, large)]
    clipped, free = (updated(config_of(optimizer_clip_norm=limit), start, gradients) for limit in (1.0, 0))
    assert not np.allclose(clipped["kernel"], free["kernel"], rtol=1e-3)


def test_decay_acts_on_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, random_trees(1)[0])
    (start,) = random_trees(1)
    moved = updated(config_of(schedule_warmup_steps=0), start, [zero])
    np.testing.assert_allclose(moved["kernel"], start["kernel"] * (1 - 0.01 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(moved["bias"], start["bias"])
