"""Population-based training (arXiv 1711.09846): the worst members copy the best ones and perturb their values.

Pure functions of arrays [N, ...] on the devices, and the file that records the lineage of a member.
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
from gptjax.runs.config import SCHEMA
from gptjax.runs.train_state import TrainState
from gptjax.training.population.members import Values

LINEAGE = "lineage.jsonl"  # in a member's directory
NOT_EXPLORED = ("seed", "model.init_std")  # fixed for the life of a member

# Keys whose values must stay below 1.
SHARES = {key for key, declared in SCHEMA.items() if 1 in (declared.below, declared.most)}


class Evolution(NamedTuple):
    """Options of population-based training.

    Attributes:
      every_steps: steps between two selections.
      share: fraction of the members that are replaced by as many of the best (truncation selection, section 4.1.1).
      factors: each value of a replaced member is multiplied by one of them (perturbation, section 4.1.1).
    """

    every_steps: int
    share: float = 0.2
    factors: tuple[float, ...] = (0.8, 1.2)


def check(evolution: Evolution, values: Mapping[str, Any], count: int) -> None:
    """Raises ConfigError for members that cannot evolve with these options."""
    if evolution.every_steps < 1:
        raise ConfigError(f"members evolve every {evolution.every_steps} steps; it must be 1 or more")
    if count < 2 or not 0 < evolution.share <= 0.5:
        raise ConfigError(f"{count} members cannot evolve by shares of {evolution.share}; give 2 or more, up to 0.5")
    if not set(values) - set(NOT_EXPLORED):
        raise ConfigError("members differ in no value that evolution can vary; sweep a key such as learning_rate")


def exploit_and_explore(
    evolution: Evolution, key: jax.Array, losses_N: jax.Array, values: Values, states: TrainState
) -> tuple[Values, TrainState, jax.Array]:
    """Replaces the worst members by copies of the best, with perturbed values.

    Args:
      evolution: the options.
      key: of the random choices.
      losses_N: held-out losses; one that is not finite is the worst.
      values, states: of all members.

    Returns:
      The new values, the new states, and the member that each state was copied from, [N].
    """
    N = losses_N.shape[0]
    n = max(1, int(evolution.share * N))
    order_N = jnp.argsort(jnp.where(jnp.isfinite(losses_N), losses_N, jnp.inf))
    pick, vary = jax.random.split(key)
    parents = jax.random.choice(pick, order_N[:n], (n,))
    source_N = jnp.arange(N).at[order_N[N - n :]].set(parents)
    replaced_N = jnp.zeros(N, bool).at[order_N[N - n :]].set(True)

    def perturb(index: int, name: str) -> jax.Array:
        value_N = values[name]
        if name in NOT_EXPLORED:
            return value_N
        factors = jnp.asarray(evolution.factors)
        drawn = jax.random.choice(jax.random.fold_in(vary, index), factors, (N,))
        varied = (value_N[source_N] * jnp.where(replaced_N, drawn, 1)).astype(value_N.dtype)
        return jnp.minimum(varied, 0.999) if name in SHARES else varied

    new_states = jax.tree.map(lambda leaf: leaf[source_N], states)
    return {name: perturb(i, name) for i, name in enumerate(sorted(values))}, new_states, source_N


def write(workdir: Path, step: int, parent: str, values: Mapping[str, Any]) -> None:
    """Records a replacement of a member: the parent whose state it copied, and its values from `step` on."""
    line = {"step": step, "from": parent, "values": {name: np.asarray(value).item() for name, value in values.items()}}
    earlier = [one for one in lines(workdir) if one["step"] < step]  # a run that was killed repeats the later ones
    write_atomic(workdir / LINEAGE, "".join(json.dumps(one) + "\n" for one in [*earlier, line]))


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Reads the replacements of a member, in order of steps."""
    return schema.read_lines(workdir / LINEAGE, {"step": int, "from": str, "values": {str: float}})


def values_at(step: int, all_workdirs: Sequence[Path], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the values of all members after a step, [N] each.

    Args:
      step: the step to resume from.
      all_workdirs: the directories of the members.
      values: the initial values.
    """
    current = {name: np.array(initial) for name, initial in values.items()}
    for m, workdir in enumerate(all_workdirs):
        for line in lines(workdir):
            if line["step"] <= step:
                for name, value_N in current.items():
                    value_N[m] = line["values"][name]
    return current
