"""Averaged parameters for evaluation: an exponential moving average, or the average that an optimizer keeps itself.

Evaluation and checkpoints read `eval_params`. EVAL_PARAMS has a function per type of optimizer state that averages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib


class EmaState(NamedTuple):
    """State of `with_ema`.

    Attributes:
      step: number of updates so far, int32.
      mean: moving average of the parameters, of their shapes.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    mean: Any
    inner: Any


def with_ema(inner: optax.GradientTransformationExtraArgs, max_decay: float) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, whose updates stay as they are, to keep an exponential moving average of the parameters.

    mean = d * mean + (1 - d) * p with d = min(max_decay, (1 + t) / (10 + t)) after t updates: the decay that
    TensorFlow's `tf.train.ExponentialMovingAverage` has with `num_updates`, so that the first values soon count little.

    Args:
      inner: the whole optimizer, whose updates are those that are applied.
      max_decay: the decay per step that is reached in the end.
    """

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), inner.init(params))

    def update(updates: Any, state: EmaState, params: Any = None, **extra: Any) -> tuple[Any, EmaState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        weight = 1 - ema_decay(state.step, max_decay)
        after = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda old, p: old + weight * (p - old), state.mean, after)
        return updates, EmaState(state.step + 1, mean, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_decay(step: jax.Array, max_decay: float) -> jax.Array:
    """Returns min(max_decay, (1 + t) / (10 + t)) after t updates."""
    return jnp.minimum(max_decay, (1 + step) / (10 + step))


# `(optimizer state, trained parameters) -> averaged parameters`, by the type of the state.
EVAL_PARAMS: dict[type, Callable[[Any, Any], Any]] = {
    EmaState: lambda state, params: state.mean,
    # Compiled once, so that the same state always gives the same bits.
    contrib.ScheduleFreeState: jax.jit(contrib.schedule_free_eval_params),
}


def _averaging_states(opt_state: Any) -> list[Any]:
    def is_average(node: Any) -> bool:
        return type(node) in EVAL_PARAMS

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(node)]


def has_eval_params(opt_state: Any) -> bool:
    """Returns True if `eval_params` differ from the trained parameters. Shapes suffice as input."""
    return bool(_averaging_states(opt_state))


def eval_params(opt_state: Any, params: Any) -> Any:
    """Returns the parameters for evaluation, sampling and loading a run.

    Args:
      opt_state: state of the optimizer.
      params: the trained parameters.

    Returns:
      The average if the optimizer keeps one, else `params` itself.
    """
    averages = _averaging_states(opt_state)
    return EVAL_PARAMS[type(averages[0])](averages[0], params) if averages else params
