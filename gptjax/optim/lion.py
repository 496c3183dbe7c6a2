"""Lion (arXiv 2302.06675)."""

import optax

from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale


def lion(context: Context) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675, program 1): the sign of the momentum. State: one copy of the parameters."""
    c = context.options
    return optax.chain(optax.scale_by_lion(b1=c.beta1, b2=c.beta2), *decay_and_scale(context))


LION = Optimizer(lion, moments=1)
