"""Detection of bad steps, whose updates are skipped. Pure, on the device; never waits for the host.

A step is bad if its loss or gradient is not finite, or, where `guard.spike_z` is set, if its loss or gradient norm is a
spike. A bad step leaves the parameters and the optimizer state as they were, to the last bit, the step count that the
schedule reads included. gptjax.training.recovery has the host's reaction to bad steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core

from gptjax.config.options import option

# Time constant, in steps, of the exponential weights of the running statistics: the size of OLMo 2's window
# (SkipStepOptimizer). The training loss falls, so that the deviation over the whole history would be far too large.
WINDOW = 128
METRICS = ("bad", "bad_in_a_row", "skipped_steps", "loss_z", "grad_norm_z")  # of `check_step`
# Lower bound of the standard deviation as a fraction of the mean, so that nearly constant values yield no spikes.
MIN_RELATIVE_STD = 1e-3


@dataclass(frozen=True)
class GuardOptions:
    """Bad steps, whose update is skipped: a loss or gradient that is not finite, or a spike."""

    spike_z: float = option(
        0.0, "a loss or gradient norm this many standard deviations above its mean is a spike; 0: no detection"
    )
    warmup_steps: int = option(100, "steps before spikes are detected; the mean and deviation cover about 128 steps")
    patience: int = option(
        5, "consecutive bad steps before a run returns to a checkpoint; the second time it stops", above=0
    )


DEFAULT = GuardOptions()


class Guard(flax.struct.PyTreeNode):
    """Running statistics of the steps so far; part of the train state, so that a run resumes exactly.

    Attributes:
      seen: number of steps in the statistics, int32.
      weight: sum of their exponential weights, float32.
      mean: mean of loss and gradient norm, float32 [2].
      variance: variance of both, float32 [2].
      skipped: number of skipped steps of the run, int32.
      in_a_row: number of consecutive skipped steps up to the newest step, int32.
    """

    seen: jax.Array
    weight: jax.Array
    mean: jax.Array
    variance: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def init_guard() -> Guard:
    """Returns the statistics before the first step."""
    shapes = {"weight": (), "mean": (2,), "variance": (2,)}
    numbers = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    # A separate array for each field: a buffer cannot be donated twice.
    return Guard(**numbers, **{name: jnp.zeros((), jnp.int32) for name in ("seen", "skipped", "in_a_row")})


def reset_statistics(guard: Guard) -> Guard:
    """Resets the statistics, not the counts, before steps of another kind, such as with longer rows."""
    new = init_guard()
    return guard.replace(seen=new.seen, weight=new.weight, mean=new.mean, variance=new.variance)


def update_statistics(guard: Guard, values: jax.Array) -> Guard:
    """Updates the statistics with the finite loss and gradient norm, [2], of one step.

    Weights decay by 1 - 1/WINDOW a step; mean and variance are exact for these weights from the first value on
    (West 1979, "Updating mean and variance estimates", with earlier weights scaled at each step).
    """
    weight = guard.weight * (1 - 1 / WINDOW) + 1
    rate, delta = 1 / weight, values - guard.mean
    mean, variance = guard.mean + rate * delta, (1 - rate) * (guard.variance + rate * delta**2)
    return guard.replace(seen=guard.seen + 1, weight=weight, mean=mean, variance=variance)


def check_step(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, limits: GuardOptions
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """Decides if a step is bad, and updates the statistics.

    A spike lies `limits.spike_z` or more standard deviations above its mean. It enters the statistics clipped to that
    limit, as in ZClip (arXiv 2504.02507, which clips the gradient norm): one spike moves them little, but they follow
    a lasting change of level within some steps. Values that are not finite do not enter them. After `limits.patience`
    bad steps in a row every step is bad, so that the parameters are unchanged when the host, which reads the result
    later, stops the run.

    Args:
      guard: statistics before the step.
      loss: mean loss of the step.
      grad_norm: global gradient norm, before clipping.
      limits: `config.guard`, see `GuardOptions`.

    Returns:
      bad, a boolean; the statistics after the step; and METRICS by name. The last two are how many standard deviations
      loss and gradient norm lie above their means, 0 during warm-up.
    """
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite = jnp.isfinite(values).all()
    std = jnp.maximum(jnp.sqrt(guard.variance), MIN_RELATIVE_STD * jnp.abs(guard.mean))
    warm = (guard.seen >= limits.warmup_steps) & (guard.seen > 0)
    z = jnp.where(warm, (values - guard.mean) / jnp.maximum(std, jnp.finfo(jnp.float32).tiny), 0.0)
    given_up = guard.in_a_row >= limits.patience
    bad = ~finite | given_up
    if limits.spike_z:
        bad |= (z >= limits.spike_z).any()
        values = jnp.where(warm, jnp.minimum(values, guard.mean + limits.spike_z * std), values)
    after = update_statistics(guard, values)
    # The square of a finite value may overflow.
    is_valid = finite & ~given_up & jnp.isfinite(after.variance).all()
    after = jax.tree.map(lambda old, new: jnp.where(is_valid, new, old), guard, after)
    after = after.replace(skipped=guard.skipped + bad, in_a_row=jnp.where(bad, guard.in_a_row + 1, 0))
    return bad, after, dict(zip(METRICS, (bad, after.in_a_row, after.skipped, z[0], z[1]), strict=True))


def skip_update_if(bad: jax.Array, change: Callable[..., Any], old: Any, *others: Any) -> Any:
    """Returns `change(old, *others)`, or `old` itself if the step is bad, leaf by leaf and bit for bit.

    Each leaf is selected as soon as it is computed, and later operations read the selected value: in a good step that
    is the new value, and in a bad one their results are discarded. Selecting between finished trees instead costs a
    copy of each leaf: Adam's parameters need the new momentum, which could not overwrite the old one while that is
    still needed (measured with AdamW on two CPU cores: a fifth of a step with large parameters, and as much memory
    again as they take).

    Args:
      bad: boolean scalar; True keeps `old`.
      change: pure function; its result is a tree like `old`.
      old, others: arguments of `change`.
    """
    arguments = (old, *others)
    closed = jax.make_jaxpr(change)(*arguments)
    program, olds = closed.jaxpr, jax.tree.leaves(old)
    values = dict(zip(program.constvars, closed.consts, strict=True))
    values |= zip(program.invars, jax.tree.leaves(arguments), strict=True)
    positions: dict[Any, int] = {}  # of a variable among the leaves
    for i, var in enumerate(program.outvars):
        if isinstance(var, core.Var) and var not in values:
            positions.setdefault(var, i)
    for equation in program.eqns:
        inputs = list(dict.fromkeys(var for var in equation.invars if isinstance(var, core.Var)))
        single = program.replace(
            constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation], effects=equation.effects
        )
        outputs = jax.core.eval_jaxpr(single, (), *(values[var] for var in inputs))
        for var, value in zip(equation.outvars, outputs, strict=True):
            values[var] = jnp.where(bad, olds[positions[var]], value) if var in positions else value
    new = [values[var] if isinstance(var, core.Var) else var.val for var in program.outvars]
    selected = set(positions.values())
    leaves = [value if i in selected else jnp.where(bad, olds[i], value) for i, value in enumerate(new)]
    return jax.tree.unflatten(jax.tree.structure(old), leaves)
