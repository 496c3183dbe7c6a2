"""The train state of a run on its devices: initialized, or restored from a checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gptjax import sharding
from gptjax.core import console
from gptjax.finetune.paths import Flat
from gptjax.optim.update_rules import with_fisher
from gptjax.runs import pretrained
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import TrainState, init_from_base, init_state
from gptjax.training import ewc
from gptjax.training.setup import TrainSetup


def init_or_restore_state(setup: TrainSetup, checkpoints: Checkpoints) -> TrainState:
    """Restores the state to resume from, or initializes it, on the devices."""
    shapes = state_shapes(setup)
    shardings = sharding.state_shardings(setup.parts.mesh, shapes)
    if setup.resumes_at:
        state = checkpoints.restore(shapes_on(shapes, shardings), setup.resumes_at)
        if setup.origin and shapes.frozen:
            state = state.replace(frozen=init_state_from_base(load_base_params(setup.origin, setup), setup).frozen)
        console.say(f"resuming   at step {int(state.step):,} of {setup.config.train.steps:,}")
        return state
    if setup.origin:
        base = load_base_params(setup.origin, setup)
        fisher = fisher_information(setup.fisher_data, setup, base) if setup.fisher_data else {}
        state = init_state_from_base(base, setup)
        console.say(f"starting   from the parameters of {setup.origin}")
        return state.replace(opt_state=with_fisher(state.opt_state, fisher))
    # The program runs once, so its compilation time matters; without optimization it draws the same numbers.
    options = {"xla_backend_optimization_level": "0"}
    return jax.jit(init_fn(setup), out_shardings=shardings, compiler_options=options)()


def init_fn(setup: TrainSetup) -> Callable[[], TrainState]:
    """Returns a function that initializes the state with random parameters."""
    return partial(init_state, setup.parts.model, setup.parts.optimizer, setup.config.seed)


def state_shapes(setup: TrainSetup) -> TrainState:
    """Shapes of the train state."""
    if not setup.origin or not pretrained.is_partial(setup.config):
        return jax.eval_shape(init_fn(setup))
    return jax.eval_shape(init_from_base_fn(setup), pretrained.base_shapes(setup.origin, setup.config))


def init_from_base_fn(setup: TrainSetup) -> Callable[[Any], TrainState]:
    """Returns a function `base parameters -> state` that initializes the state of a run with an origin."""
    return lambda base: init_from_base(base, setup.parts.model, setup.parts.optimizer, setup.config)


def load_base_params(origin: Path, setup: TrainSetup) -> Any:
    """Loads the parameters that the run starts from: the newest of its origin, or those it was imported with."""
    mesh = setup.parts.mesh
    base = (
        pretrained.base_params(origin, setup.config, mesh)
        if origin != setup.workdir
        else pretrained.load_params(origin, mesh)
    )
    if pretrained.is_partial(setup.config):
        pretrained.record_base(setup.workdir, base)
    return base


def fisher_information(fisher_data: ewc.FisherData, setup: TrainSetup, base: Any) -> Flat:
    """Estimates the Fisher information of the base parameters, by path; see gptjax.training.ewc."""
    shapes = state_shapes(setup).params
    return ewc.fisher_information(fisher_data, setup.config, base, shapes, setup.workdir, setup.parts.mesh)


def init_state_from_base(base: Any, setup: TrainSetup) -> TrainState:
    """Initializes the state from these parameters, whose buffers are donated."""
    shardings = sharding.state_shardings(setup.parts.mesh, state_shapes(setup))
    donated = () if setup.config.finetune.quantise != "none" else 0  # no quantized output is as large as they are
    return jax.jit(init_from_base_fn(setup), out_shardings=shardings, donate_argnums=donated)(base)
