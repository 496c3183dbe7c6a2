"""Optimizers and schedules by name: optax chains, made from `config.optimizer` and `config.schedule`."""

from collections.abc import Callable
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]


def cosine(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up to the peak, half a cosine down to its final fraction (arXiv 1608.03983, eq. 5), then that."""
    decay_steps = config.decay_steps or steps
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, config.warmup_steps, max(decay_steps, config.warmup_steps + 1), peak * config.final_fraction
    )


def constant(peak: float, config: Any, steps: int) -> Schedule:
    """Linear warm-up, then the peak to the end."""
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, optax.constant_schedule(peak)], [config.warmup_steps])


SCHEDULES: dict[str, Callable[[float, Any, int], Schedule]] = {"cosine": cosine, "constant": constant}


def matrices(params: Any) -> Any:
    """True for each matrix and embedding, by name: those that weight decay acts on. Stacking layers changes no name."""
    return jax.tree_util.tree_map_with_path(lambda path, p: path[-1].key in ("kernel", "embedding"), params)


def adamw(config: Any, learning_rate: Schedule) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101, algorithm 2), with decay on matrices only."""
    return optax.adamw(
        learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=matrices,
    )


OPTIMIZERS: dict[str, Callable[[Any, Schedule], optax.GradientTransformation]] = {"adamw": adamw}


def schedule(config: Any) -> Schedule:
    """Learning rate as a function of the step, for a whole run's config."""
    return SCHEDULES[config.schedule.name](config.optimizer.learning_rate, config.schedule, config.train.steps)


def optimizer(config: Any) -> optax.GradientTransformation:
    """The optimizer of a whole run's config: clipping by global norm, then the named update on its schedule."""
    clip = config.optimizer.clip_norm
    clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
    return optax.chain(clipping, OPTIMIZERS[config.optimizer.name](config.optimizer, schedule(config)))
