"""Optimizers by name, one a file: optax chains built from a run's config. Weight decay is decoupled in all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import optax

from gptjax.config import options as sections
from gptjax.config.options import option
from gptjax.models.layers import is_zero
from gptjax.optim.adafactor import ADAFACTOR
from gptjax.optim.adagrad import ADAGRAD
from gptjax.optim.adamw import ADAMW
from gptjax.optim.averaging import with_ema
from gptjax.optim.lion import LION
from gptjax.optim.muon import MUON
from gptjax.optim.optimizer import Context, Optimizer
from gptjax.optim.rmsprop import RMSPROP
from gptjax.optim.schedule_free import SCHEDULE_FREE
from gptjax.optim.schedules import schedule
from gptjax.optim.sgd import SGD
from gptjax.optim.sophia import SOPHIA
from gptjax.optim.update_rules import with_update_rules

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": ADAMW,
    "muon": MUON,
    "lion": LION,
    "adafactor": ADAFACTOR,
    "sophia": SOPHIA,
    "schedule_free": SCHEDULE_FREE,
    "sgd": SGD,
    "rmsprop": RMSPROP,
    "adagrad": ADAGRAD,
}


@dataclass(frozen=True)
class OptimizerOptions:
    """Keys that several optimizers share; each has its own in a section of its name."""

    name: str = option("adamw", "the optimizer", choices=OPTIMIZERS)
    learning_rate: float = option(
        6e-3, "peak learning rate; adafactor: relative to the parameter's root mean square", traced=True
    )
    weight_decay: float = option(0.1, "decoupled weight decay, times the learning rate, of matrices only", traced=True)
    beta1: float = option(
        0.9, "decay of the first moment, per step; lion, schedule_free: interpolation weight", below=1, traced=True
    )
    beta2: float = option(
        0.95,
        "decay of the second moment, per step; lion: of the momentum; sophia: of the Hessian",
        below=1,
        traced=True,
    )
    epsilon: float = option(
        1e-8, "added to the root of the second moment; sophia: lower bound of the denominator", traced=True
    )
    clip_norm: float = option(1.0, "maximum global norm of the gradient; 0: no clipping", traced=True)
    ema: float = option(
        0.0, "decay per step of the moving average of the parameters that is used in their place; 0: none", below=1
    )


def optimizer(config: Any) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a run's config: clipping by global norm, the named optimizer on its schedule, the update
    rules of fine-tuning, and the moving average.

    Its `update` takes `obj_fn`, the step's loss as a function of the parameters; only "sophia" needs it.
    """
    shared, chosen = config.optimizer, OPTIMIZERS[config.optimizer.name]
    own = sections.parse(chosen.options, shared[shared.name]) if chosen.options else None
    options = sections.parse(OptimizerOptions, shared)
    context = Context(options, own, partial(schedule, config), config.model, config.seed)
    clipping = optax.identity() if is_zero(shared.clip_norm) else optax.clip_by_global_norm(shared.clip_norm)
    whole = with_update_rules(config, optax.chain(clipping, chosen.build(context)))
    return with_ema(whole, shared.ema) if shared.ema else whole


def problems(config: Any) -> Iterator[str]:
    """Yields problems of `config.optimizer` and `config.schedule` with each other and with the model."""
    c, model = config.optimizer, config.model
    scales = model.parametrization == "mup" or model.base_layers is not None
    if c.name == "schedule_free" and c.beta1 == 0:
        yield "optimizer.beta1 is 0; schedule_free needs more than 0"
    if c.name == "schedule_free" and c.ema:
        yield f"optimizer.name=schedule_free and optimizer.ema={c.ema} both average; leave one out"
    if scales and not OPTIMIZERS[c.name].scales_with_width:
        known = [name for name, one in OPTIMIZERS.items() if one.scales_with_width]
        yield f"optimizer.name={c.name} has no known scaling rule; use {', '.join(known[:-1])} or {known[-1]}"
