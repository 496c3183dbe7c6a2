"""Stochastic gradient descent with momentum."""

from dataclasses import dataclass

import optax

from gptjax.config.options import option
from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale


@dataclass(frozen=True)
class SgdOptions:
    """Momentum of stochastic gradient descent."""

    momentum: float = option(
        0.9, "decay of the running sum of gradients, per step; 0: no momentum", below=1, traced=True
    )
    nesterov: bool = option(False, "Nesterov's momentum: the gradient plus momentum times the new sum")


def sgd(context: Context) -> optax.GradientTransformation:
    """SGD with momentum in the form of Sutskever et al. 2013 ("On the importance of initialization and momentum in deep
    learning", eq. 1-4) that PyTorch has: the learning rate scales the running sum, not each gradient in it.
    """
    momentum = optax.trace(decay=context.own.momentum, nesterov=context.own.nesterov)
    return optax.chain(momentum, *decay_and_scale(context))


SGD = Optimizer(sgd, SgdOptions, moments=1, scales_with_width=False)
