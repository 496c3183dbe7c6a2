"""Sophia-H (arXiv 2305.14342)."""

from dataclasses import dataclass

import jax
import optax
from optax import contrib

from gptjax.config.options import option
from gptjax.core import rng
from gptjax.optim.optimizer import Context, Optimizer, weight_decay_mask


@dataclass(frozen=True)
class SophiaOptions:
    """Estimates of the Hessian."""

    gamma: float = option(0.01, "factor of the Hessian in the denominator; the lower, the more updates are clipped")
    hessian_every_steps: int = option(10, "steps between estimates of the Hessian's diagonal", above=0)


def sophia(context: Context) -> optax.GradientTransformation:
    """Sophia-H (arXiv 2305.14342, algorithms 1 and 3), with optax's bias correction of the momentum.

    Every `hessian_every_steps` its update estimates the Hessian's diagonal: it differentiates `obj_fn`, which the train
    step passes, twice along a random direction of signs. An estimate is used from the following step on, so the first
    update is the sign of the momentum.
    """
    c = context.options
    key = jax.random.key_data(rng.key(context.seed, "hessian"))  # Orbax saves no typed keys
    return contrib.sophia(
        context.schedule(),
        b1=c.beta1,
        b2=c.beta2,
        eps=c.epsilon,
        weight_decay=c.weight_decay,
        weight_decay_mask=weight_decay_mask,
        gamma=context.own.gamma,
        update_interval=context.own.hessian_every_steps,
        hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(key),
    )


SOPHIA = Optimizer(sophia, SophiaOptions, moments=2, scales_with_width=False)
