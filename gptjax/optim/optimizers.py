"""Optimizers by name: optax chains, made from a whole run's config. Weight decay is decoupled in all of them.

What an optimizer does to a parameter is decided by the parameter's name, never by its number of dimensions, so that
stacking layers changes nothing.
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
from gptjax.optim.averaging import averaged
from gptjax.optim.schedules import Schedule, schedule
from gptjax.optim.update_rules import tuning


def names(path: Any) -> list[str]:
    """("block_0", "mlp", "up", "kernel") of a leaf's path in the parameters."""
    return [key.key for key in path]


def matrices(params: Any) -> Any:
    """True for each matrix and embedding, by name: those that weight decay acts on. Stacking layers changes no name."""
    return jax.tree_util.tree_map_with_path(lambda path, p: names(path)[-1] in ("kernel", "embedding"), params)


def hidden_matrices(params: Any) -> Any:
    """True for each matrix but the head's: those that turn hidden features into hidden features."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: names(path)[-1] == "kernel" and "head" not in names(path), params
    )


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which reads the shape of a leaf, on each layer of the leaves that `scan_layers` stacks by itself."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: "stacked" if "blocks" in names(path) else "single", params
        )

    def init(params: Any) -> Any:
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.vmap(inner.update)(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

    return optax.partition({"stacked": optax.GradientTransformation(init, update), "single": inner}, labels)


def by_width(config: Any, orthogonal: bool = False) -> optax.GradientTransformation:
    """Updates times what the model's parametrisation asks for each parameter.

    Weight decay comes behind it, and is per unit of the rate that is not so changed: the product of the two is to be
    the same at any width (arXiv 2309.14322, section 3.2.1; so does the authors' own package, mup).
    """

    def scaled(updates: Any, params: Any = None) -> Any:
        factors = learning_rate_multipliers(updates, config.model, orthogonal)
        return updates if factors is None else jax.tree.map(lambda factor, u: factor * u, factors, updates)

    return optax.stateless(scaled)


def decayed(config: Any, rate: Schedule, orthogonal: bool = False) -> list[optax.GradientTransformation]:
    """The end of a chain: p - rate * (update + weight_decay * p), with decay on matrices only."""
    decay = optax.add_decayed_weights(config.optimizer.weight_decay, matrices)
    return [by_width(config, orthogonal), decay, optax.scale_by_learning_rate(rate)]


def adamw_on(config: Any, rate: Schedule) -> optax.GradientTransformation:
    """AdamW at a rate of one's own."""
    c = config.optimizer
    return optax.chain(optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=c.epsilon), *decayed(config, rate))


def adamw(config: Any) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101, algorithm 2), with decay on matrices only."""
    return adamw_on(config, schedule(config))


def muon(config: Any) -> optax.GradientTransformation:
    """Muon (Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024), and AdamW off hidden matrices.

    A matrix's update is its momentum with all singular values made about 1 (five Newton-Schulz steps), times
    0.2 sqrt(max(rows, columns)): its root mean square is then near AdamW's (arXiv 2502.16982, eq. 4), so that one
    learning rate serves both. Layers and experts that are stacked are batches of matrices; queries, keys and values
    that share a kernel are one.
    """
    c = config.optimizer
    adam_rate = schedule(config, c.adam_learning_rate)
    by_matrix = contrib.scale_by_muon(beta=c.momentum, weight_dimension_numbers=last_two_axes)
    # Not contrib.muon: its AdamW part would be NAdam, and would decay either norms and biases too, or nothing.
    parts = {
        "muon": optax.chain(by_matrix, optax.stateless(like_adam), *decayed(config, schedule(config), orthogonal=True)),
        "adamw": adamw_on(config, adam_rate),
    }
    return optax.partition(
        parts, lambda params: jax.tree.map(lambda own: "muon" if own else "adamw", hidden_matrices(params))
    )


def last_two_axes(updates: Any) -> Any:
    """Where Muon finds its matrices: rows and columns are the last two axes, those before count matrices."""
    return jax.tree.map(lambda u: contrib.MuonDimensionNumbers(u.ndim - 2, u.ndim - 1), updates)


def like_adam(updates: Any, params: Any) -> Any:
    """Orthogonal matrices scaled to a root mean square of 0.2, near that of AdamW's updates (arXiv 2502.16982, 2.2)."""
    return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)


def lion(config: Any) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675, program 1): the sign of a mean of gradients. Memory: one copy of the parameters."""
    c = config.optimizer
    return optax.chain(optax.scale_by_lion(b1=c.beta1, b2=c.beta2), *decayed(config, schedule(config)))


def adafactor(config: Any) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5): rows' and columns' means in place of all squared gradients.

    The learning rate is relative: a step is about that times the root mean square of the parameter. Its decay of
    squared gradients is 1 - t^-0.8 and its epsilons are 1e-30 and 1e-3, as in section 9. Matrices with a side below
    128 keep all their squares.
    """
    # Not optax.adafactor: its decay would not follow the learning rate.
    by_leaf = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return optax.chain(layer_by_layer(by_leaf), *decayed(config, schedule(config)))


def sophia(config: Any) -> optax.GradientTransformation:
    """Sophia-H (arXiv 2305.14342, algorithms 1 and 3), with optax's bias correction of the momentum.

    Every `hessian_every_steps` its update differentiates `obj_fn`, which the train step hands it, twice along a random
    direction of signs. An estimate counts from the following step on: the first step is one by sign.
    """
    c = config.optimizer
    key = jax.random.key_data(rng.key(config.seed, "hessian"))  # orbax saves numbers
    return contrib.sophia(
        schedule(config),
        b1=c.beta1,
        b2=c.beta2,
        eps=c.epsilon,
        weight_decay=c.weight_decay,
        weight_decay_mask=matrices,
        gamma=c.gamma,
        update_interval=c.hessian_every_steps,
        hessian_diagonal_fn=contrib.hutchinson_estimator_diag_hessian(key),
    )


def schedule_free(config: Any) -> optax.GradientTransformation:
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1): no decay of the learning rate, an average answers instead.

    Gradients are taken at y, which the train state holds as its parameters; `answering` gives x, the average.
    """
    c, rate = config.optimizer, schedule(config)
    # AdamW without its momentum, whose place the averaging takes.
    squares = optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False, bias_correction=True)
    # It counts from 1, and weighs z by the rate of its newest step.
    return contrib.schedule_free(
        optax.chain(squares, *decayed(config, rate)), lambda count: rate(count - 1), b1=c.beta1
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
    """The optimizer of a whole run's config: clipping by global norm, the named update on its schedule, fine-tuning's,
    and a mean beside it.

    Its `update` may be told `obj_fn`, the step's loss as a function of the parameters; only "sophia" needs it.
    """
    clip = config.optimizer.clip_norm
    clipping = optax.identity() if is_zero(clip) else optax.clip_by_global_norm(clip)
    whole = tuning(config, optax.chain(clipping, OPTIMIZERS[config.optimizer.name](config)))
    return averaged(whole, config.optimizer.ema) if config.optimizer.ema else whole
