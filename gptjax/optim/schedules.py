"""Schedules by name: the learning rate as a function of the step, made from `config.schedule`.

Each takes the peak, `config.schedule` and the run's steps, and rises linearly from zero over `warmup_steps`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]


def warmed_up(peak: float, steps: int, after: Schedule) -> Schedule:
    """Linear from zero to the peak over `steps`, then `after`, which counts from there; no warm-up for 0 steps."""
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), after], [steps])


def last_step(config: Any, steps: int) -> int:
    """The step at which the decay ends: `decay_steps`, but never before the warm-up is over."""
    return max(config.decay_steps or steps, config.warmup_steps + 1)


def cosine(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up to the peak, half a cosine down to its final fraction (arXiv 1608.03983, eq. 5), then that."""
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, config.warmup_steps, last_step(config, steps), peak * config.final_fraction
    )


def linear(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up to the peak, a straight line down to its final fraction (arXiv 1810.04805, A.2), then that."""
    decay = last_step(config, steps) - config.warmup_steps
    return warmed_up(peak, config.warmup_steps, optax.linear_schedule(peak, peak * config.final_fraction, decay))


def wsd(peak: float, config: Any, steps: int) -> Schedule:
    """Warm-up, stable, decay: a trapezoid (arXiv 2404.06395, section 4.2; linear decay as in arXiv 2405.18392, eq. 1).

    The last `cooldown_fraction` of the decay's steps go linearly from the peak to its final fraction.
    """
    end = last_step(config, steps)
    begin = max(end - round(config.cooldown_fraction * end), config.warmup_steps)
    decay = optax.linear_schedule(
        peak, peak * config.final_fraction, max(end - begin, 1), transition_begin=begin - config.warmup_steps
    )
    return warmed_up(peak, config.warmup_steps, decay)


def inverse_sqrt(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up, then peak * sqrt(warmup / step) (arXiv 1706.03762, eq. 3); without warm-up peak / sqrt(step)."""
    scale = max(config.warmup_steps, 1)

    def after(since: Any) -> Any:
        return peak * jnp.sqrt(scale / jnp.maximum(since + config.warmup_steps, scale))

    return warmed_up(peak, config.warmup_steps, after)


def constant(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up, then the peak to the end."""
    return warmed_up(peak, config.warmup_steps, optax.constant_schedule(peak))


SCHEDULES: dict[str, Callable[[float, Any, int], Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "constant": constant,
}


def schedule(config: Any, peak: float | None = None) -> Schedule:
    """Learning rate as a function of the step, for a whole run's config.

    Args:
      config: of the run.
      peak: the highest rate; None: `config.optimizer.learning_rate`.
    """
    highest = config.optimizer.learning_rate if peak is None else peak
    return SCHEDULES[config.schedule.name](highest, config.schedule, config.train.steps)
