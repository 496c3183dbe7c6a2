"""Bad steps on the device: they are skipped, good ones are unchanged, and statistics hold finite values only."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import strategies as st

from gptjax import models, optim, sharding
from gptjax.objectives.causal import causal
from gptjax.optim import skip_step
from gptjax.optim.skip_step import GuardOptions
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state
from gptjax.training.step import jit_step, train_step

BAD_ID = 250  # a batch that begins with it is poisoned


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def poisoned(model, how, by):
    """The causal objective, times `by` where the batch begins with BAD_ID; by `how`, the metric as well."""
    inner = causal(model)

    def objective(params, batch, rng):
        loss, said = inner(params, batch, rng)
        factor = jnp.where(batch["inputs_BT"][0, 0] == BAD_ID, by, 1.0)
        return loss * factor, {"loss": said["loss"] * (factor if how == "loss" else 1.0)}

    return objective


def batch_of(number, bad=False):
    ids = np.random.default_rng(number).integers(0, 9, (4, 17))
    ids[0, 0] = BAD_ID if bad else 1
    return {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((4, 16), "f")}


def stepper(limits=skip_step.DEFAULT, how="loss", by=jnp.nan, **changes):
    config = configs.with_vocabulary(tiny_config(model_layers=1, schedule_name="constant", **changes), 257)
    model, optimizer, mesh = models.build(config.model), optim.optimizer(config), sharding.make_mesh()
    whole = sharding.replicated(mesh)
    state = jax.jit(lambda: init_state(model, optimizer, 0), out_shardings=whole)()
    step = jit_step(train_step(poisoned(model, how, by), optimizer, mesh, 0, limits=limits), mesh, state)
    return state, step.lower(state, batch_of(0)).compile({"xla_backend_optimization_level": 0})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, ema, how, by",
    [("adamw", 0.0, "loss", np.nan), ("schedule_free", 0.0, "gradient", np.inf), ("adamw", 0.9, "gradient", np.nan)],
)
def test_nonfinite_step_is_skipped_exactly(name, ema, how, by):
    state, step = stepper(how=how, by=by, optimizer_name=name, optimizer_ema=ema)
    for number in range(3):
        state, said = step(state, batch_of(number))
        assert not said["bad"]
    before = jax.device_get(state)
    state, said = step(state, batch_of(3, bad=True))
    assert said["bad"] and said["skipped_steps"] == said["bad_in_a_row"] == 1
    assert bool(np.isfinite(said["loss"])) == (how == "gradient") and not np.isfinite(said["grad_norm"])
    equal((state.params, state.opt_state), (before.params, before.opt_state))
    statistics = ("seen", "weight", "mean", "variance")
    equal(*[[getattr(guard, name) for name in statistics] for guard in (state.guard, before.guard)])
    state, said = step(state, batch_of(4))
    without, _ = step(jax.device_put(before.replace(step=before.step + 1), state.step.sharding), batch_of(4))
    equal((state.params, state.opt_state, state.step), (without.params, without.opt_state, without.step))
    assert not said["bad"] and said["skipped_steps"] == 1 and said["bad_in_a_row"] == 0


@pytest.mark.slow
def test_good_steps_are_bit_identical_to_unguarded_ones(monkeypatch):
    state, step = stepper()
    monkeypatch.setattr(skip_step, "skip_update_if", lambda bad, change, old, *others: change(old, *others))
    other, unguarded = stepper()
    assert step.memory_analysis().alias_size_in_bytes >= unguarded.memory_analysis().alias_size_in_bytes > 0
    for number in range(20):
        state, _ = step(state, batch_of(number))
        other, _ = unguarded(other, batch_of(number))
    equal(state, other)


@pytest.mark.slow
def test_skipping_costs_no_copy(monkeypatch):
    """Selecting between finished trees makes XLA copy both of Adam's moments."""
    _, step = stepper()
    monkeypatch.setattr(skip_step, "skip_update_if", lambda bad, change, old, *others: change(old, *others))
    _, unguarded = stepper()
    copies = [compiled.as_text().count(" copy(") for compiled in (step, unguarded)]
    assert copies[0] <= copies[1] + 2


def test_skip_of_shared_and_unchanged_leaves():
    old = {"a": jnp.array(1.0), "b": jnp.array(2.0), "same": jnp.array(3.0), "fixed": jnp.array(4.0)}

    def change(old, x):
        twice = jnp.sin(x) * 2
        return {"a": twice, "b": twice, "same": old["same"], "fixed": jnp.array(5.0)}

    run = jax.jit(lambda bad: skip_step.skip_update_if(bad, change, old, jnp.array(1.0)))
    equal(run(True), old)
    equal(run(False), jax.jit(change)(old, jnp.array(1.0)))


def verdicts(values, limits):
    """Checks a sequence of (loss, gradient norm): which are bad, and the guard after them."""

    def one(guard, value):
        bad, guard, said = skip_step.check_step(guard, value[0], value[1], limits)
        return guard, (bad, said["loss_z"])

    guard, (bad, z) = jax.jit(lambda values: jax.lax.scan(one, skip_step.init_guard(), values))(
        jnp.array(values, jnp.float32)
    )
    return np.asarray(bad), guard, np.asarray(z)


def weighted(values):
    """Mean and variance of rows whose weights fall by 1 - 1/WINDOW from the newest back."""
    weights = (1 - 1 / skip_step.WINDOW) ** np.arange(len(values))[::-1]
    mean = np.average(values, axis=0, weights=weights)
    return mean, np.average((values - mean) ** 2, axis=0, weights=weights)


numbers = st.floats(0.0625, 100, width=32)
rows = st.lists(
    st.tuples(numbers, numbers, st.sampled_from(["", "", "", "nan", "inf", "-inf"])), min_size=24, max_size=24
)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(rows, st.integers(0, 1))
def test_statistics_are_those_of_the_finite_steps_alone(rows, which):
    values = np.array([row[:2] for row in rows], np.float32)
    finite = np.array([not row[2] for row in rows])
    planted = values.copy()
    for i, row in enumerate(rows):
        if row[2]:
            planted[i, which] = float(row[2])
    bad, guard, _ = verdicts(planted, GuardOptions(patience=100))
    np.testing.assert_array_equal(bad, ~finite)
    assert guard.seen == finite.sum() and guard.skipped == (~finite).sum()
    if finite.any():
        mean, variance = weighted(values[finite].astype(float))
        np.testing.assert_allclose(guard.mean, mean, rtol=1e-4)
        np.testing.assert_allclose(guard.variance, variance, rtol=1e-3, atol=1e-5 * np.max(mean) ** 2)


def noise(count, level=4.0, spread=0.05):
    return np.random.default_rng(0).normal(level, spread, (count, 2))


def test_spikes_are_detected_after_warmup_and_upward_only():
    for at, column, size, expected in [
        (150, 0, 9, 1),
        (150, 1, 9, 1),
        (150, 0, 4.1, 0),
        (150, 1, 0.1, 0),
        (20, 0, 9, 0),
    ]:
        values = noise(200)
        values[at, column] = size
        bad, _, z = verdicts(values, GuardOptions(spike_z=6.0))
        assert bad.sum() == expected and (not expected or bad[at])
        assert expected == 0 or column == 1 or z[at] > 50
        assert not verdicts(values, skip_step.DEFAULT)[0].any(), "unless asked for, nothing finite is bad"


def test_outliers_hardly_move_the_statistics():
    values = noise(200)
    for at, size, seen in [(150, 1e6, 200), (150, np.inf, 199)]:
        values[at, 0] = size
        values[170, 0] = 5.0
        bad, guard, _ = verdicts(values, GuardOptions(spike_z=6.0))
        assert list(np.flatnonzero(bad)) == [150, 170] and guard.seen == seen


def test_overflow_of_a_square_does_not_spoil_the_statistics():
    values = noise(200)
    values[120] = 1e30
    _, guard, _ = verdicts(values, skip_step.DEFAULT)
    assert np.isfinite(guard.variance).all() and np.isfinite(guard.mean).all() and guard.seen == 199


def test_statistics_follow_a_lasting_change():
    values = np.concatenate([noise(200), noise(200, level=4.45)])
    bad, _, _ = verdicts(values, GuardOptions(spike_z=6.0))
    assert 0 < bad.sum() < 5 and not bad[210:].any()


def test_every_step_is_skipped_after_patience():
    values = noise(20)
    values[10:13] = np.nan
    bad, guard, _ = verdicts(values, GuardOptions(patience=3))
    assert bad[10:].all() and not bad[:10].any() and guard.in_a_row == 10 and guard.seen == 10
    assert verdicts(values, GuardOptions(patience=4))[0].sum() == 3
