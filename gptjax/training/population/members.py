"""Runs of one program: configs that differ in values which change no shape, as one config in which these are traced.

Pure functions of the values; nothing here trains, reads or writes. What trains is
gptjax.training.population.population.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import optim
from gptjax.config.errors import ConfigError
from gptjax.finetune import methods
from gptjax.objectives import loss
from gptjax.optim import skip_step as guards
from gptjax.runs.train_state import TrainState, initial
from gptjax.training.step import drops_out, train_step, twice_differentiable

# Keys that members may differ in, and what a value of theirs is to the program.
TRACED: dict[str, Any] = {
    "seed": np.uint32,
    "model.init_std": np.float32,
    "model.dropout": np.float32,
    "optimizer.learning_rate": np.float32,
    "optimizer.adam_learning_rate": np.float32,
    "optimizer.weight_decay": np.float32,
    "optimizer.beta1": np.float32,
    "optimizer.beta2": np.float32,
    "optimizer.epsilon": np.float32,
    "optimizer.momentum": np.float32,
    "optimizer.clip_norm": np.float32,
    "schedule.warmup_steps": np.int32,
    "schedule.decay_steps": np.int32,
    "schedule.final_fraction": np.float32,
    "schedule.cooldown_fraction": np.float32,
}
OF_BATCHES = ("data.seed",)  # read where batches are made, not by the program

Values = dict[str, jax.Array]  # of the keys that are traced, [M] of all members or [] of one


class Members(NamedTuple):
    """Runs that are one program."""

    config: ConfigDict  # of the first
    values: dict[str, np.ndarray]  # of the keys that differ and are traced, [M]


def of(all_configs: Sequence[ConfigDict], asked: Sequence[ConfigDict] = ()) -> Members:
    """Resolved configs as members; what was asked for, before it was resolved, is for the message.

    Raises:
      ConfigError: they differ in what would change the program.
    """
    flat = [configs.flatten(config) for config in all_configs]
    differing, wanted = differing_keys(flat), differing_keys([configs.flatten(config) for config in asked])
    refused = [key for key in differing if key not in TRACED and key not in OF_BATCHES]
    # What decides about a program by being absent is no number.
    refused += [key for key in differing if key in TRACED and any(one[key] is None for one in flat)]
    refused.sort(key=lambda key: key not in wanted)  # first what is not there for another's sake
    if refused:
        given = ", ".join(dict.fromkeys(str(one[refused[0]]) for one in flat))
        raise ConfigError(
            f"{refused[0]} ({given}) changes the program, and members of one program differ in numbers that it reads "
            "alone; leave --vmap out to train one after the other"
        )
    traced = [key for key in TRACED if key in differing]
    return Members(all_configs[0], {key: np.array([as_traced(key, one[key]) for one in flat]) for key in traced})


def differing_keys(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that some of these have another value of than the first, or none."""
    return [key for key in (flat[0] if flat else ()) if any(one.get(key, ...) != flat[0][key] for one in flat[1:])]


def as_traced(key: str, value: Any) -> Any:
    """A key's value as the program gets it: a clipping norm of 0, which means none, as one that clips nothing."""
    if key == "optimizer.clip_norm" and value == 0:
        value = np.inf
    return np.asarray(value).astype(TRACED[key])


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The config with these in their places, of whatever type they are."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            *section, name = key.split(".")
            (config[section[0]] if section else config)[name] = value
    return config.lock()


def state_of(config: ConfigDict, values: Values) -> TrainState:
    """A member's state at step 0."""
    own = with_values(config, values)
    return initial(methods.build_model(own), optim.optimizer(own), own.seed)


def step_of(
    config: ConfigDict, mesh: Mesh, values: Values, state: TrainState, batch: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A member's step; see gptjax.training.step.train_step.

    Args:
      config: of the first member.
      mesh: of one device.
      values: this member's.
      state: likewise.
      batch: likewise, or all members' one.
    """
    own = with_values(config, values)
    limits, slices = guards.Limits(**own.guard), own.train.grad_accumulation
    objective, optimizer = loss(own, methods.build_model(own)), optim.optimizer(own)
    curvature = twice_differentiable(own, objective, mesh)
    step = train_step(
        objective, optimizer, mesh, own.seed, drops_out(own), slices, limits, own.log.statistics, curvature
    )
    return step(state, batch)
