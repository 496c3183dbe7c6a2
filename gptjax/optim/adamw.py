"""AdamW (arXiv 1711.05101)."""

import optax

from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale
from gptjax.optim.schedules import Schedule


def adamw(context: Context, rate: Schedule | None = None) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101, algorithm 2), with decay on matrices only; by default on the run's schedule."""
    c = context.options
    return optax.chain(optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon), *decay_and_scale(context, rate))


ADAMW = Optimizer(adamw, moments=2)
