"""Schedule-free AdamW (arXiv 2405.15682)."""

import optax
from optax import contrib

from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale


def schedule_free(context: Context) -> optax.GradientTransformation:
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1): averages parameters instead of decaying the learning rate.

    Gradients are taken at y, which the train state holds as its parameters; `eval_params` gives x, the average.
    """
    c, rate = context.options, context.schedule()
    # AdamW without momentum, which the averaging replaces.
    squares = optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False, bias_correction=True)
    # optax counts steps from 1, and weighs z by the learning rate of its newest step.
    return contrib.schedule_free(
        optax.chain(squares, *decay_and_scale(context, rate)), lambda count: rate(count - 1), b1=c.beta1
    )


SCHEDULE_FREE = Optimizer(schedule_free, moments=2)
