"""Optimizers by name: optax chains built from a run's config. Weight decay is decoupled in all of them.

A parameter's name decides how an optimizer treats it, never its number of dimensions, so that stacked layers are
trained as separate ones are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from gptjax.core import rng
from gptjax.models.layers import is_zero
from gptjax.models.parametrization import learning_rate_multipliers
from gptjax.optim.averaging import with_ema
from gptjax.optim.schedules import Schedule, schedule
from gptjax.optim.update_rules import with_update_rules


def path_names(path: Any) -> list[str]:
    """Returns the names on a leaf's path in the parameters, such as ["block_0", "mlp", "up", "kernel"]."""
    return [key.key for key in path]


def weight_decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for each matrix and embedding, by name. Weight decay acts on these."""
    return jax.tree_util.tree_map_with_path(lambda path, p: path_names(path)[-1] in ("kernel", "embedding"), params)


def hidden_matrix_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for each matrix but the head's: those between hidden features."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: path_names(path)[-1] == "kernel" and "head" not in path_names(path), params
    )


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner`, which depends on a leaf's shape, to each layer of leaves that `scan_layers` stacks."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: "stacked" if "blocks" in path_names(path) else "single", params
        )

    def init(params: Any) -> Any:
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.vmap(inner.update)(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

    return optax.partition({"stacked": optax.GradientTransformation(init, update), "single": inner}, labels)


def scale_by_width(config: Any, orthogonal: bool = False) -> optax.GradientTransformation:
    """Scales updates by the model parametrization's learning rate factor of each parameter.

    Weight decay follows it in the chain and is not scaled: learning rate times weight decay is to be the same at any
    width (arXiv 2309.14322, section 3.2.1; as in the authors' package, mup).
    """

    def scaled(updates: Any, params: Any = None) -> Any:
        factors = learning_rate_multipliers(updates, config.model, orthogonal)
        return updates if factors is None else jax.tree.map(lambda factor, u: factor * u, factors, updates)

    return optax.stateless(scaled)


def decay_and_scale(config: Any, rate: Schedule, orthogonal: bool = False) -> list[optax.GradientTransformation]:
    """Returns the end of a chain: p - rate * (update + weight_decay * p), with decay on matrices only."""
    decay = optax.add_decayed_weights(config.optimizer.weight_decay, weight_decay_mask)
    return [scale_by_width(config, orthogonal), decay, optax.scale_by_learning_rate(rate)]


def adamw_with_schedule(config: Any, rate: Schedule) -> optax.GradientTransformation:
    """AdamW with the given learning rate schedule."""
    c = config.optimizer
    return optax.chain(optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon), *decay_and_scale(config, rate))


def adamw(config: Any) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101, algorithm 2), with decay on matrices only."""
    return adamw_with_schedule(config, schedule(config))


def muon(config: Any) -> optax.GradientTransformation:
    """Muon (Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024); AdamW on all but hidden matrices.

    A matrix's update is its momentum with all singular values set to about 1 (five Newton-Schulz steps), times
    0.2 sqrt(max(rows, columns)): its root mean square is then near AdamW's (arXiv 2502.16982, eq. 4), so that one
    learning rate serves both. Stacked layers and experts are batches of matrices. Queries, keys and values that share
    a kernel are one matrix.
    """
    c = config.optimizer
    adam_rate = schedule(config, c.adam_learning_rate)
    by_matrix = contrib.scale_by_muon(beta=c.momentum, weight_dimension_numbers=muon_dimension_numbers)
    # Not contrib.muon: its AdamW part would be NAdam, and would decay either norms and biases too, or nothing.
    parts = {
        "muon": optax.chain(
            by_matrix, optax.stateless(match_adam_rms), *decay_and_scale(config, schedule(config), orthogonal=True)
        ),
        "adamw": adamw_with_schedule(config, adam_rate),
    }
    return optax.partition(
        parts,
        lambda params: jax.tree.map(lambda is_hidden: "muon" if is_hidden else "adamw", hidden_matrix_mask(params)),
    )


def muon_dimension_numbers(updates: Any) -> Any:
    """Returns Muon's dimension numbers: the last two axes are rows and columns, those before are batch axes."""
    return jax.tree.map(lambda u: contrib.MuonDimensionNumbers(u.ndim - 2, u.ndim - 1), updates)


def match_adam_rms(updates: Any, params: Any) -> Any:
    """Scales orthogonal matrices to a root mean square of 0.2, near that of AdamW's updates (arXiv 2502.16982, 2.2)."""
    return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)


def lion(config: Any) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675, program 1): the sign of the momentum. State: one copy of the parameters."""
    c = config.optimizer
    return optax.chain(optax.scale_by_lion(b1=c.beta1, b2=c.beta2), *decay_and_scale(config, schedule(config)))


def adafactor(config: Any) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5): second moments factored into means of rows and of columns.

    The learning rate is relative: a step is about that times the root mean square of the parameter. The decay of the
    second moments is 1 - t^-0.8 and the epsilons are 1e-30 and 1e-3, as in section 9. Matrices with a side below 128
    are not factored.
    """
    # Not optax.adafactor: its decay would not follow the learning rate.
    by_leaf = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return optax.chain(per_layer(by_leaf), *decay_and_scale(config, schedule(config)))


def sophia(config: Any) -> optax.GradientTransformation:
    """Sophia-H (arXiv 2305.14342, algorithms 1 and 3), with optax's bias correction of the momentum.

    Every `hessian_every_steps` its update estimates the Hessian's diagonal: it differentiates `obj_fn`, which the train
    step passes, twice along a random direction of signs. An estimate is used from the following step on, so the first
    update is the sign of the momentum.
    """
    c = config.optimizer
    key = jax.random.key_data(rng.key(config.seed, "hessian"))  # Orbax saves no typed keys
    return contrib.sophia(
        schedule(config),
        b1=c.beta1,
        b2=c.beta2,
        eps=c.epsilon,
        weight_decay=c.weight_decay,
        weight_decay_mask=weight_decay_mask,
        gamma=c.gamma,
        update_interval=c.hessian_every_steps,
        hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(key),
    )


def schedule_free(config: Any) -> optax.GradientTransformation:
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1): averages parameters instead of decaying the learning rate.

    Gradients are taken at y, which the train state holds as its parameters; `eval_params` gives x, the average.
    """
    c, rate = config.optimizer, schedule(config)
    # AdamW without momentum, which the averaging replaces.
    squares = optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False, bias_correction=True)
    # optax counts steps from 1, and weighs z by the learning rate of its newest step.
    return contrib.schedule_free(
        optax.chain(squares, *decay_and_scale(config, rate)), lambda count: rate(count - 1), b1=c.beta1
    )


OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
    "sophia": sophia,
    "schedule_free": schedule_free,
}


def optimizer(config: Any) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a run's config: clipping by global norm, the named optimizer on its schedule, the update
    rules of fine-tuning, and the moving average.

    Its `update` takes `obj_fn`, the step's loss as a function of the parameters; only "sophia" needs it.
    """
    clip = config.optimizer.clip_norm
    clipping = optax.identity() if is_zero(clip) else optax.clip_by_global_norm(clip)
    whole = with_update_rules(config, optax.chain(clipping, OPTIMIZERS[config.optimizer.name](config)))
    return with_ema(whole, config.optimizer.ema) if config.optimizer.ema else whole
