"""Which steps are bad, and what is kept of them: nothing. Pure, on the device; never waits for the host.

A step is bad whose loss or gradient is not finite, and, where a run asks for it, one whose loss or gradient norm is a
spike. A bad step leaves parameters and optimizer as they were, to the last bit; its count, on which the schedule goes
by, too. What the host does about bad steps is in gptjax.training.recovery.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core

# Steps over which the running statistics reach back, by exponential weights; as many as OLMo 2's window has (its
# SkipStepOptimizer). Training's loss falls: over all history its spread would be far too wide.
WINDOW = 128
METRICS = ("bad", "bad_in_a_row", "skipped_steps", "loss_z", "grad_norm_z")  # of `judged`
# What is nearer to the mean than this share of it is no spike, however even the values before it were.
MIN_RELATIVE_STD = 1e-3


class Limits(NamedTuple):
    """`config.guard`; see configs/base.py."""

    spike_z: float = 0.0
    warmup_steps: int = 100
    patience: int = 5


DEFAULT = Limits()


class Guard(flax.struct.PyTreeNode):
    """What is remembered of the steps so far; part of the train state, so that a run goes on exactly.

    Attributes:
      seen: how many steps the statistics hold, int32.
      weight: what these weigh together, float32.
      mean: of their loss and gradient norm, float32 [2].
      variance: likewise.
      skipped: steps of the run that changed nothing, int32.
      in_a_row: how many of them are the newest steps, one after the other, int32.
    """

    seen: jax.Array
    weight: jax.Array
    mean: jax.Array
    variance: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def init_guard() -> Guard:
    """Before the first step."""
    shapes = {"weight": (), "mean": (2,), "variance": (2,)}
    numbers = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    # An array each: no array's memory can be given away twice.
    return Guard(**numbers, **{name: jnp.zeros((), jnp.int32) for name in ("seen", "skipped", "in_a_row")})


def reset_statistics(guard: Guard) -> Guard:
    """Before the first step of another kind, such as of longer rows: earlier values say nothing about its own."""
    new = init_guard()
    return guard.replace(seen=new.seen, weight=new.weight, mean=new.mean, variance=new.variance)


def update_statistics(guard: Guard, values: jax.Array) -> Guard:
    """The statistics with one step's finite loss and gradient norm, [2], after those that they hold.

    Weights fall by 1 - 1/WINDOW a step; mean and variance are exact for these weights from the first value on
    (West 1979, "Updating mean and variance estimates", with earlier weights scaled at each step).
    """
    weight = guard.weight * (1 - 1 / WINDOW) + 1
    share, off = 1 / weight, values - guard.mean
    mean, variance = guard.mean + share * off, (1 - share) * (guard.variance + share * off**2)
    return guard.replace(seen=guard.seen + 1, weight=weight, mean=mean, variance=variance)


def check_step(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, limits: Limits
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """Whether a step is bad, and what is remembered after it.

    A spike lies `limits.spike_z` or more standard deviations above its mean. It enters the statistics as the highest
    value that is none, as in ZClip (arXiv 2504.02507, there of the gradient norm, and to clip it): one spike moves them
    little, but a level that has changed for good is followed within some steps instead of never. Nothing that is not
    finite enters them. After `limits.patience` bad steps in a row every step is bad: the host, which reads
    a step's verdict later, finds the parameters as they were.

    Args:
      guard: before the step.
      loss: of the step, mean.
      grad_norm: global, before clipping.
      limits: see configs/base.py.

    Returns:
      bad, a boolean; the guard after the step; and METRICS by name, of which the last two, how many standard deviations
      above their means loss and gradient norm lie, are 0 during warm-up.
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
    # A finite value may have a square that is not.
    enters = finite & ~given_up & jnp.isfinite(after.variance).all()
    after = jax.tree.map(lambda old, new: jnp.where(enters, new, old), guard, after)
    after = after.replace(skipped=guard.skipped + bad, in_a_row=jnp.where(bad, guard.in_a_row + 1, 0))
    return bad, after, dict(zip(METRICS, (bad, after.in_a_row, after.skipped, z[0], z[1]), strict=True))


def skip_update_if(bad: jax.Array, change: Callable[..., Any], old: Any, *others: Any) -> Any:
    """`change(old, *others)`, or after a bad step `old` itself, leaf by leaf and bit by bit.

    Each leaf is chosen as soon as it is computed, and what follows from it is computed from the one chosen; in a good
    step that is the same, in a bad one nothing of it is kept. To choose among finished trees instead costs a copy of
    each leaf: Adam's parameters need the new momentum, whose place the old one, still wanted, would have to leave
    (measured with AdamW on two CPU cores: a fifth of a step whose parameters are large, and memory for as many again).

    Args:
      bad: whether to keep `old`.
      change: pure; its result is a tree as `old`.
      old, others: what it is given.
    """
    arguments = (old, *others)
    closed = jax.make_jaxpr(change)(*arguments)
    program, olds = closed.jaxpr, jax.tree.leaves(old)
    values = dict(zip(program.constvars, closed.consts, strict=True))
    values |= zip(program.invars, jax.tree.leaves(arguments), strict=True)
    places: dict[Any, int] = {}  # of a variable among the leaves
    for i, var in enumerate(program.outvars):
        if isinstance(var, core.Var) and var not in values:
            places.setdefault(var, i)
    for equation in program.eqns:
        reads = list(dict.fromkeys(var for var in equation.invars if isinstance(var, core.Var)))
        one = program.replace(
            constvars=[], invars=reads, outvars=equation.outvars, eqns=[equation], effects=equation.effects
        )
        found = jax.core.eval_jaxpr(one, (), *(values[var] for var in reads))
        for var, value in zip(equation.outvars, found, strict=True):
            values[var] = jnp.where(bad, olds[places[var]], value) if var in places else value
    new = [values[var] if isinstance(var, core.Var) else var.val for var in program.outvars]
    chosen = set(places.values())
    leaves = [value if i in chosen else jnp.where(bad, olds[i], value) for i, value in enumerate(new)]
    return jax.tree.unflatten(jax.tree.structure(old), leaves)
