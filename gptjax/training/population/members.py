"""Members of a population: configs that differ only in values that can be traced, as one config with these traced.

Pure functions of the values; gptjax.training.population.population trains them.
"""

import functools
import operator
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
from gptjax.runs.config import SCHEMA
from gptjax.runs.train_state import TrainState, init_state
from gptjax.training import recovery
from gptjax.training.step import train_step_of

DTYPES = {int: np.int32, float: np.float32}  # of traced values, by the type of their option
# Keys in which members may differ, and the dtype of their traced values.
TRACED: dict[str, Any] = {
    key: np.uint32 if key == "seed" else DTYPES[declared.types[0]]
    for key, declared in SCHEMA.items()
    if declared.traced
}
BATCH_KEYS = ("data.seed",)  # read by the data pipeline, not by the compiled program

Values = dict[str, jax.Array]  # by traced key: [N] for all members, [] for one


class Members(NamedTuple):
    """Configs that are trained as one program."""

    config: ConfigDict  # of the first member
    values: dict[str, np.ndarray]  # of the traced keys that differ, [N]


def from_configs(all_configs: Sequence[ConfigDict], unresolved: Sequence[ConfigDict] = ()) -> Members:
    """Makes members of resolved configs.

    Args:
      all_configs: resolved.
      unresolved: the same configs as the user gave them; used by the message alone.

    Raises:
      ConfigError: they differ in a key that changes the program.
    """
    flat = [configs.flatten(config) for config in all_configs]
    differing, explicit = differing_keys(flat), differing_keys([configs.flatten(config) for config in unresolved])
    refused = [key for key in differing if key not in TRACED and key not in BATCH_KEYS]
    # A key whose None selects another program cannot be traced.
    refused += [key for key in differing if key in TRACED and any(one[key] is None for one in flat)]
    refused.sort(key=lambda key: key not in explicit)  # first the keys that the user set
    if refused:
        given = ", ".join(dict.fromkeys(str(one[refused[0]]) for one in flat))
        raise ConfigError(
            f"{refused[0]} ({given}) changes the compiled program, and members of a population may differ only in "
            "numbers; leave --vmap out to train one after the other"
        )
    traced = [key for key in TRACED if key in differing]
    return Members(all_configs[0], {key: np.array([traced_value(key, one[key]) for one in flat]) for key in traced})


def differing_keys(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all of these flat configs."""
    return [key for key in (flat[0] if flat else ()) if any(one.get(key, ...) != flat[0][key] for one in flat[1:])]


def traced_value(key: str, value: Any) -> Any:
    """Converts a value to its traced dtype; a clipping norm of 0, which means no clipping, becomes infinity."""
    if key == "optimizer.clip_norm" and value == 0:
        value = np.inf
    return np.asarray(value).astype(TRACED[key])


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of the config with these values, which may be of any type."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for key, value in values.items():
            *sections, name = key.split(".")
            functools.reduce(operator.getitem, sections, config)[name] = value
    return config.lock()


def init_member_state(config: ConfigDict, values: Values) -> TrainState:
    """Initializes the state of one member at step 0."""
    config = with_values(config, values)
    return init_state(methods.build_model(config), optim.optimizer(config), config.seed)


def member_step(
    config: ConfigDict, mesh: Mesh, values: Values, state: TrainState, batch: Any, left_out: jax.Array | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of one member; see gptjax.training.step.train_step.

    Args:
      config: of the first member.
      mesh: of one device.
      values: of this member.
      state: of this member.
      batch: of this member, or shared by all.
      left_out: True if this member leaves the batch out; None: no member does.
    """
    config = with_values(config, values)
    step = train_step_of(config, loss(config, methods.build_model(config)), optim.optimizer(config), mesh)
    new, metrics = step(state, batch)
    return (new, metrics) if left_out is None else recovery.skip_batch_if(left_out, state, new, metrics)
