"""Every optimizer in the train step: the loss falls, and a checkpoint resumes exactly."""

import json

import jax
import numpy as np
import optax
import pytest
from conftest import evaluate, tiny_config

import gptjax
from gptjax import models, optim, sharding
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import init_from_params, init_state
from gptjax.training import loop
from gptjax.training.step import jit_step, train_step

# Steps of about the same size; Adafactor's are relative to parameters of 0.02.
RATES = dict.fromkeys(optim.OPTIMIZERS, 0.01) | {"adafactor": 0.3}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def config_of(name, **changes):
    settings = dict(optimizer_name=name, optimizer_learning_rate=RATES[name], schedule_name="constant")
    return configs.with_vocabulary(tiny_config(model_layers=1, **settings | changes), 257)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: init_state(models.build(config_of("adamw").model), optax.identity(), 0))().params


@pytest.mark.thorough
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_training_and_exact_resume(name, tmp_path, params):
    """Sophia with dropout and two slices: its second derivative goes through those too."""
    more = dict(model_dropout=0.1, optimizer_sophia_hessian_every_steps=2) if name == "sophia" else {}
    config = config_of(name, **more)
    model, optimizer, mesh = models.build(config.model), optim.optimizer(config), sharding.make_mesh()
    whole = sharding.replicated(mesh)
    ids = np.random.default_rng(0).integers(0, 9, (8, 17))
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((8, 16), "f")}
    state = jax.jit(lambda params: init_from_params(params, optimizer), out_shardings=whole)(params)
    like = shapes_on(jax.eval_shape(lambda: init_state(model, optimizer, 0)), whole)
    step = jit_step(train_step(causal(model), optimizer, mesh, 0, bool(more), 2 if more else 1), mesh, state)
    step = step.lower(state, batch).compile({"xla_backend_optimization_level": 0})  # compiles in half the time

    def steps(state, count):
        losses = []
        for _ in range(count):
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
        return state, losses

    state, early = steps(state, 5)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state)
        state, late = steps(state, 5)
        checkpoints.wait()
        again = checkpoints.restore(like)
    equal(steps(again, 5)[0], state)
    assert late[-1] < early[0] - 0.2 and all(np.isfinite(early + late))


AVERAGING = {
    "schedule_free": dict(optimizer_name="schedule_free", schedule_name="constant", optimizer_learning_rate=0.02),
    "ema": dict(optimizer_ema=0.5),
}


@pytest.mark.parametrize("name", [pytest.param("schedule_free", marks=pytest.mark.slow), "ema"])
def test_averages_are_loaded_and_runs_resume_exactly(name, tmp_path, text_file, call):
    """The same run uninterrupted, and interrupted at step 6 and resumed from step 4."""
    config = tiny_config(model_layers=1, data_path=text_file, eval_batches=1000, **AVERAGING[name])
    summary = loop.train(config, tmp_path / "whole")

    def interrupt(line):
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "cut", interrupt)
    loop.train(config, tmp_path / "cut")

    run = gptjax.load(tmp_path / "whole")
    equal(gptjax.load(tmp_path / "cut").params, run.params)
    result = call(evaluate, f"--workdir={tmp_path / 'whole'}", "--json")
    assert json.loads(result.out)["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val/loss"] == pytest.approx(summary["val_loss"], rel=1e-6), "the sample is the whole"

    like = jax.eval_shape(lambda: init_state(run.model, optim.optimizer(config), 0))
    like = shapes_on(like, sharding.replicated(sharding.make_mesh()))
    states = []
    for folder in ("whole", "cut"):
        with Checkpoints(tmp_path / folder) as checkpoints:
            states.append(checkpoints.restore(like))
    equal(*states)
    trained = states[0]
    equal(optim.eval_params(trained.opt_state, trained.params), run.params)
    for there, here in zip(jax.tree.leaves(trained.params), jax.tree.leaves(run.params), strict=True):
        assert not np.array_equal(there, here)
