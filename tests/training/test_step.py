"""The train step: microbatches sum to the batch, devices agree with one, randomness is a function of the step."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_steps import batch_of, setting

from gptjax import objectives, sharding
from gptjax.training.step import jit_step, microbatch_loss, train_step


def stepped(slices=1, steps=3, seed=0, **changes):
    objective, optimizer, mesh, state = setting(**changes)
    step = jit_step(train_step(objective, optimizer, mesh, seed, "model_dropout" in changes, slices), mesh, state)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch_of())
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("slices", [2, 4, 8])
@pytest.mark.slow
def test_gradient_accumulation_equals_the_whole_batch(slices):
    """With rows of different weights, a mean of the microbatches' means would differ."""
    whole, losses = stepped(1)
    parts, their_losses = stepped(slices)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    # Adam makes much of a gradient that is next to nothing: hence not 1e-5.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole.params, parts.params)


def test_the_loss_is_the_mean_over_weights():
    objective, optimizer, mesh, state = setting()
    batch = batch_of()
    expected = float(objective(state.params, batch, None)[0]) / batch["weights_BT"].sum()
    _, metrics = jit_step(train_step(objective, optimizer, mesh, 0), mesh, state)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("slices", [1, 2])
def test_obj_fn_is_the_mean_loss_of_one_microbatch(slices):
    """Weighted by the mean weight of a microbatch, not its own, which may be 0."""
    objective, _, mesh, state = setting(model_layers=1)
    batch = objectives.normalize_weights(batch_of())
    first = {name: rows[::slices] for name, rows in batch.items()}
    got, expected = jax.jit(
        lambda batch: (
            microbatch_loss(objective, batch, None, slices, mesh)(state.params),
            objective(state.params, first, None)[0] * slices,
        )
    )(batch)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_the_same_step_twice_is_bit_identical_and_seeds_differ():
    first, losses = stepped(model_dropout=0.3)
    again, same = stepped(model_dropout=0.3)
    _, other = stepped(model_dropout=0.3, seed=1)
    assert losses == same != other and int(first.step) == 3
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


@pytest.mark.slow
def test_dropout_differs_from_step_to_step():
    objective, optimizer, mesh, state = setting(model_dropout=0.5)
    step = jax.jit(train_step(objective, optimizer, mesh, 0, dropout=True))
    at = [float(step(state.replace(step=state.step + n), batch_of())[1]["loss"]) for n in range(3)]
    assert len(set(at)) == 3


def test_the_old_state_is_donated():
    objective, optimizer, mesh, state = setting()
    state = jax.device_put(state, sharding.replicated(mesh))
    jit_step(train_step(objective, optimizer, mesh, 0), mesh, state)(state, batch_of())
    assert state.params["tokens"]["embedding"].is_deleted()


FOUR_DEVICES = """
import json, sys
sys.path.insert(0, "tests/training"); sys.path.insert(0, "tests")
import jax
from test_step import stepped
print(json.dumps([jax.device_count(), stepped(int(sys.argv[1]))[1]]))
"""


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.slow
def test_several_devices_take_the_same_steps_as_one(slices):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES, str(slices)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    devices, losses = json.loads(done.stdout)
    assert devices == 4
    np.testing.assert_allclose(losses, stepped(slices)[1], rtol=1e-5)
