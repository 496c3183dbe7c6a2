"""Population-based training (arXiv 1711.09846): the worst members take the best ones' places, and vary their values.

Pure functions of arrays [M, ...] on the devices, and the file of a run that says what became of its values.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import ConfigError
from gptjax.core import schema
from gptjax.core.files import write_atomic
from gptjax.runs.train_state import TrainState
from gptjax.training.population.members import Values

LINEAGE = "lineage.jsonl"  # in a member's directory
NOT_EXPLORED = ("seed", "model.init_std")  # what a member began with, and nothing that it could vary

# What stays less than 1 whatever it is multiplied with.
SHARES = ("optimizer.beta1", "optimizer.beta2", "optimizer.momentum", "model.dropout", "schedule.cooldown_fraction")


class Evolution(NamedTuple):
    """How members evolve.

    Attributes:
      every_steps: between two selections.
      share: of the members that are replaced, by as many of the best (section 4.1.1's truncation selection).
      factors: one of which each value of a replaced member is multiplied with (section 4.1.1's perturbation).
    """

    every_steps: int
    share: float = 0.2
    factors: tuple[float, ...] = (0.8, 1.2)


def check(evolution: Evolution, values: Mapping[str, Any], count: int) -> None:
    """Raises ConfigError for members that cannot evolve so."""
    if evolution.every_steps < 1:
        raise ConfigError(f"members evolve every {evolution.every_steps} steps; it must be 1 or more")
    if count < 2 or not 0 < evolution.share <= 0.5:
        raise ConfigError(f"{count} members cannot evolve by shares of {evolution.share}; give 2 or more, up to 0.5")
    if not set(values) - set(NOT_EXPLORED):
        raise ConfigError("nothing that members could vary differs between them; sweep a key such as learning_rate")


def evolved(
    evolution: Evolution, key: jax.Array, losses_M: jax.Array, values: Values, states: TrainState
) -> tuple[Values, TrainState, jax.Array]:
    """The members after a selection: their values, their states, and whose state each has now, [M].

    Args:
      evolution: how.
      key: of what is drawn.
      losses_M: on held-out text; one that is not finite is the worst.
      values, states: of all members.
    """
    M = losses_M.shape[0]
    n = max(1, int(evolution.share * M))
    order_M = jnp.argsort(jnp.where(jnp.isfinite(losses_M), losses_M, jnp.inf))
    pick, vary = jax.random.split(key)
    parents = jax.random.choice(pick, order_M[:n], (n,))
    source_M = jnp.arange(M).at[order_M[M - n :]].set(parents)
    replaced_M = jnp.zeros(M, bool).at[order_M[M - n :]].set(True)

    def explored(index: int, name: str) -> jax.Array:
        value_M = values[name]
        if name in NOT_EXPLORED:
            return value_M
        factors = jnp.asarray(evolution.factors)
        drawn = jax.random.choice(jax.random.fold_in(vary, index), factors, (M,))
        varied = (value_M[source_M] * jnp.where(replaced_M, drawn, 1)).astype(value_M.dtype)
        return jnp.minimum(varied, 0.999) if name in SHARES else varied

    others = jax.tree.map(lambda leaf: leaf[source_M], states)
    return {name: explored(i, name) for i, name in enumerate(sorted(values))}, others, source_M


def write(workdir: Path, step: int, parent: str, values: Mapping[str, Any]) -> None:
    """Notes what became of a member at a step: whose state it has now, and its values from then on."""
    line = {"step": step, "from": parent, "values": {name: np.asarray(value).item() for name, value in values.items()}}
    earlier = [one for one in lines(workdir) if one["step"] < step]  # of later ones a killed run's checkpoint is gone
    write_atomic(workdir / LINEAGE, "".join(json.dumps(one) + "\n" for one in [*earlier, line]))


def lines(workdir: Path) -> list[dict[str, Any]]:
    """What was noted of a member, in order."""
    return schema.read_lines(workdir / LINEAGE, {"step": int, "from": str, "values": {str: float}})


def values_at(step: int, all_workdirs: Sequence[Path], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values that members had after a step, [M] each.

    Args:
      step: with which they go on.
      all_workdirs: the members'.
      values: those that they began with.
    """
    found = {name: np.array(own) for name, own in values.items()}
    for m, workdir in enumerate(all_workdirs):
        for line in lines(workdir):
            if line["step"] <= step:
                for name, value_M in found.items():
                    value_M[m] = line["values"][name]
    return found
