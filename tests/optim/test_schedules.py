"""Schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import optim


def rates(name, warmup=4, steps=20, **changes):
    """Learning rates at steps 0 to `steps`, with a peak of 1 and a final fraction of 0.25, as a run computes them."""
    settings = dict(optimizer_learning_rate=1.0, schedule_final_fraction=0.25, train_steps=steps)
    config = tiny_config(schedule_name=name, schedule_warmup_steps=warmup, **settings | changes)
    return np.asarray(jax.jit(jax.vmap(optim.schedule(config)))(jnp.arange(steps + 1)))


# The rate at a step after the warm-up of w steps; the decay ends at step 20.
FORMULAS = {
    "cosine": lambda t, w: 0.25 + 0.75 * (1 + math.cos(math.pi * (t - w) / (20 - w))) / 2,
    "linear": lambda t, w: 1 - 0.75 * (t - w) / (20 - w),
    "wsd": lambda t, w: 1.0 if t < 15 else 1 - 0.75 * (t - 15) / 5,
    "inverse_sqrt": lambda t, w: math.sqrt(max(w, 1) / max(t, 1)),
    "constant": lambda t, w: 1.0,
}


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_schedule_vs_formula(name, warmup):
    expected = [t / warmup if t < warmup else FORMULAS[name](t, warmup) for t in range(21)]
    np.testing.assert_allclose(rates(name, warmup, schedule_cooldown_fraction=0.25), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decay_ends_at_decay_steps(name):
    got = rates(name, schedule_decay_steps=10)
    assert got[9] > got[10] == pytest.approx(0.25) and set(got[10:]) == {got[10]}


def test_cooldown_fraction_of_zero_and_one():
    assert set(rates("wsd", schedule_cooldown_fraction=0.0)[4:]) == {1.0}
    np.testing.assert_allclose(rates("wsd", schedule_cooldown_fraction=1.0), rates("linear"), atol=1e-6)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_run_shorter_than_its_warmup(name):
    np.testing.assert_allclose(rates(name, warmup=100, steps=5), np.arange(6) / 100, rtol=1e-6)
