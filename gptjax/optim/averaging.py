"""Parameters that answer in place of those that train: a running mean, or what an optimizer averages by itself.

Whoever evaluates or saves asks `answering`; how a state answers is in `ANSWERS`, by its type.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib


class EmaState(NamedTuple):
    """The state of an optimizer beside which a mean is kept.

    Attributes:
      step: updates so far, int32.
      mean: of the parameters, of their shapes.
      inner: the optimizer's own state.
    """

    step: jax.Array
    mean: Any
    inner: Any


def with_ema(inner: optax.GradientTransformationExtraArgs, longest: float) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which changes nothing of its updates, with a running mean of the parameters after each of them.

    mean = d * mean + (1 - d) * p with d = min(longest, (1 + t) / (10 + t)), t updates before this one: the decay that
    TensorFlow's `tf.train.ExponentialMovingAverage` has with `num_updates`, so that the first values soon count little.

    Args:
      inner: a whole optimizer, whose updates are those that are applied.
      longest: the decay that is come to, per step.
    """

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), inner.init(params))

    def update(updates: Any, state: EmaState, params: Any = None, **extra: Any) -> tuple[Any, EmaState]:
        updates, own = inner.update(updates, state.inner, params, **extra)
        share = 1 - ema_decay(state.step, longest)
        after = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda old, p: old + share * (p - old), state.mean, after)
        return updates, EmaState(state.step + 1, mean, own)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_decay(step: jax.Array, longest: float) -> jax.Array:
    """min(longest, (1 + t) / (10 + t)) after t updates."""
    return jnp.minimum(longest, (1 + step) / (10 + step))


# How a state that averages answers: `(state, the parameters that train) -> parameters`.
EVAL_PARAMS: dict[type, Callable[[Any, Any], Any]] = {
    EmaState: lambda state, params: state.mean,
    # Compiled once, so that whoever asks for the same state's answer gets the same bits.
    contrib.ScheduleFreeState: jax.jit(contrib.schedule_free_eval_params),
}


def _averaging_states(opt_state: Any) -> list[Any]:
    def is_average(node: Any) -> bool:
        return type(node) in EVAL_PARAMS

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]


def has_eval_params(opt_state: Any) -> bool:
    """Whether `answering` differs from the parameters that are trained. Shapes suffice."""
    return bool(_averaging_states(opt_state))


def eval_params(opt_state: Any, params: Any) -> Any:
    """The parameters that evaluation, samples and whoever loads the run read.

    Args:
      opt_state: of the optimizer.
      params: those that it trains.

    Returns:
      `params` itself, but for an optimizer that averages.
    """
    averages = _averaging_states(opt_state)
    return EVAL_PARAMS[type(averages[0])](averages[0], params) if averages else params
