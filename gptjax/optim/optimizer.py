"""What every optimizer is made of: its description, weight decay, and updates that follow the width.

A parameter's name decides how an optimizer treats it, never its number of dimensions, so that stacked layers are
trained as separate ones are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gptjax.models.parametrization import learning_rate_multipliers
from gptjax.optim.schedules import Schedule


class Context(NamedTuple):
    """What a run gives to its optimizer.

    Attributes:
      options: `config.optimizer`, which several optimizers share.
      own: the optimizer's own section of it, an instance of `Optimizer.options`.
      schedule: learning rate over the steps for a peak, by default `options.learning_rate`.
      model: `config.model`, whose parametrization scales updates.
      seed: of the run.
    """

    options: Any
    own: Any
    schedule: Callable[..., Schedule]
    model: Any
    seed: Any


class Optimizer(NamedTuple):
    """An optimizer by name.

    Attributes:
      build: makes the optax transformation, with decoupled weight decay.
      options: dataclass of its own keys, `config.optimizer.NAME`; None: it has none.
      moments: number of float32 copies of the parameters in its state, at least.
      scales_with_width: True if the model parametrization has a rule for its learning rates.
    """

    build: Callable[[Context], optax.GradientTransformation]
    options: type | None = None
    moments: int = 0
    scales_with_width: bool = True


def path_names(path: Any) -> list[str]:
    """Returns the names on a leaf's path in the parameters, such as ["block_0", "mlp", "up", "kernel"]."""
    return [key.key for key in path]


def weight_decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for each matrix and embedding, by name. Weight decay acts on these."""
    return jax.tree_util.tree_map_with_path(lambda path, p: path_names(path)[-1] in ("kernel", "embedding"), params)


def scale_by_width(context: Context, orthogonal: bool = False) -> optax.GradientTransformation:
    """Scales updates by the model parametrization's learning rate factor of each parameter.

    Weight decay follows it in the chain and is not scaled: learning rate times weight decay is to be the same at any
    width (arXiv 2309.14322, section 3.2.1; as in the authors' package, mup).
    """

    def scaled(updates: Any, params: Any = None) -> Any:
        factors = learning_rate_multipliers(updates, context.model, orthogonal)
        return updates if factors is None else jax.tree.map(lambda factor, u: factor * u, factors, updates)

    return optax.stateless(scaled)


def decay_and_scale(
    context: Context, rate: Schedule | None = None, orthogonal: bool = False
) -> list[optax.GradientTransformation]:
    """Returns the end of a chain: p - rate * (update + weight_decay * p), with decay on matrices only.

    Args:
      context: of the run.
      rate: learning rate; None: `context.schedule()`.
      orthogonal: True if updates are orthogonal matrices.
    """
    decay = optax.add_decayed_weights(context.options.weight_decay, weight_decay_mask)
    rate = context.schedule() if rate is None else rate
    return [scale_by_width(context, orthogonal), decay, optax.scale_by_learning_rate(rate)]
