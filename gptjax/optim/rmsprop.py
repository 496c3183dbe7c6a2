"""RMSProp (Tieleman and Hinton 2012, lecture 6.5 of "Neural Networks for Machine Learning")."""

from dataclasses import dataclass

import optax

from gptjax.config.options import option
from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale


@dataclass(frozen=True)
class RmspropOptions:
    """Means of RMSProp; the epsilon is `optimizer.epsilon`."""

    decay: float = option(0.99, "decay of the mean of squared gradients, per step", below=1, traced=True)
    momentum: float = option(0.0, "decay of the running sum of updates, per step; 0: no momentum", below=1, traced=True)
    centered: bool = option(False, "divide by the standard deviation of gradients (arXiv 1308.0850, eq. 38-45)")


def rmsprop(context: Context) -> optax.GradientTransformation:
    """RMSProp: gradients divided by the root of the running mean of their squares, without bias correction."""
    c, epsilon = context.own, context.options.epsilon
    scale = optax.scale_by_stddev if c.centered else optax.scale_by_rms
    scaled = scale(decay=c.decay, eps=epsilon, eps_in_sqrt=False)
    return optax.chain(scaled, optax.trace(decay=c.momentum), *decay_and_scale(context))


RMSPROP = Optimizer(rmsprop, RmspropOptions, moments=2)
