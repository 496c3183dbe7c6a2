"""Schedules by name: the learning rate as a function of the step, made from `config.schedule`.

Each takes the peak, `config.schedule` and the number of steps of the run, and rises linearly from zero over
`warmup_steps`. These values may be traced, so that one program trains runs that differ in them
(gptjax.training.population.members). Building a schedule allocates no arrays: it computes only when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from gptjax.config.options import option

Schedule = Callable[[Any], Any]


def interpolate(start: Any, end: Any, steps: Any) -> Schedule:
    """Linear from start to end over `steps` (at least one), constant after them."""

    def value(count: Any) -> Any:
        remaining = 1 - jnp.clip(count / jnp.maximum(steps, 1), 0, 1)
        return (start - end) * remaining + end

    return value


def with_warmup(peak: Any, steps: Any, after: Schedule) -> Schedule:
    """Linear from zero to the peak over `steps`, then `after`, which counts from there; no warm-up for 0 steps."""
    warmup = interpolate(0.0, peak, steps)
    return lambda count: jnp.where(count < steps, warmup(count), after(count - steps))


def decay_end(config: Any, steps: int) -> Any:
    """Returns the step at which the decay ends: `decay_steps`, but never before the warm-up is over."""
    end = steps if config.decay_steps is None else config.decay_steps
    return jnp.maximum(end, config.warmup_steps + 1)


def cosine(peak: Any, config: Any, steps: int) -> Schedule:
    """Linear warm-up to the peak, half a cosine to its final fraction (arXiv 1608.03983, eq. 5), constant after."""
    final = config.final_fraction

    def after(since: Any) -> Any:
        decay = decay_end(config, steps) - config.warmup_steps
        factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(since / decay, 1)))
        return peak * ((1 - final) * factor + final)

    return with_warmup(peak, config.warmup_steps, after)


def linear(peak: Any, config: Any, steps: int) -> Schedule:
    """Linear warm-up to the peak, linear decay to its final fraction (arXiv 1810.04805, A.2), constant after."""

    def after(since: Any) -> Any:
        return interpolate(peak, peak * config.final_fraction, decay_end(config, steps) - config.warmup_steps)(since)

    return with_warmup(peak, config.warmup_steps, after)


def wsd(peak: Any, config: Any, steps: int) -> Schedule:
    """Warm-up, stable, decay: a trapezoid (arXiv 2404.06395, section 4.2; linear decay as in arXiv 2405.18392, eq. 1).

    The last `cooldown_fraction` of the decay's steps go linearly from the peak to its final fraction.
    """

    def after(since: Any) -> Any:
        end = decay_end(config, steps)
        begin = jnp.maximum(end - jnp.round(config.cooldown_fraction * end), config.warmup_steps)
        return interpolate(peak, peak * config.final_fraction, end - begin)(since - (begin - config.warmup_steps))

    return with_warmup(peak, config.warmup_steps, after)


def inverse_sqrt(peak: Any, config: Any, steps: int) -> Schedule:
    """Linear warm-up, then peak * sqrt(warmup / step) (arXiv 1706.03762, eq. 3); without warm-up peak / sqrt(step)."""

    def after(since: Any) -> Any:
        scale = jnp.maximum(config.warmup_steps, 1)
        return peak * jnp.sqrt(scale / jnp.maximum(since + config.warmup_steps, scale))

    return with_warmup(peak, config.warmup_steps, after)


def constant(peak: Any, config: Any, steps: int) -> Schedule:
    """Linear warm-up, then the peak to the end."""
    return with_warmup(peak, config.warmup_steps, lambda since: peak)


SCHEDULES: dict[str, Callable[[Any, Any, int], Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
    "constant": constant,
}


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over the steps."""

    name: str = option("cosine", "form of the decay; wsd: warmup-stable-decay", choices=SCHEDULES)
    warmup_steps: int = option(100, "steps of linear warmup from zero to the peak", traced=True)
    decay_steps: int | None = option(
        None, "step at which cosine, linear and wsd reach the end of their decay; None: train.steps", traced=True
    )
    final_fraction: float = option(0.1, "learning rate at the end of the decay, as a fraction of the peak", traced=True)
    cooldown_fraction: float = option(0.2, "wsd: fraction of decay_steps spent decaying", most=1, traced=True)


def schedule(config: Any, peak: Any = None) -> Schedule:
    """Builds the learning rate schedule of a run's config.

    Args:
      config: config of the run.
      peak: the highest learning rate; None: `config.optimizer.learning_rate`.
    """
    peak = config.optimizer.learning_rate if peak is None else peak
    return SCHEDULES[config.schedule.name](peak, config.schedule, config.train.steps)
