"""Update rules of fine-tuning: learning rates by path, regularization towards the start, AdaLoRA's rank budget.

Each is an optax transformation of trees of the trainable parameters; the loss does not depend on them.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.finetune import paths
from gptjax.finetune.paths import Flat


def with_update_rules(config: Any, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a run's optimizer with the update rules of its `config.finetune`."""
    options, steps = config.finetune, config.train.steps
    before = [l2_sp(options.l2_to_start)] if options.l2_to_start else []
    if options.ewc:
        before.append(ewc(options.ewc))
    if options.method == "adalora":
        before.append(orthogonality_penalty(options.adalora.orthogonality))
    chain = optax.chain(*before, inner, scale_by_path(options))
    if options.method == "adalora":
        chain = adalora(optax.with_extra_args_support(chain), options, steps)
    return optax.with_extra_args_support(chain)


# Learning rates.


class ScaleByPathState(NamedTuple):
    """Number of steps so far."""

    step: jax.Array


def scale_by_path(options: Any) -> optax.GradientTransformation:
    """Scales updates by factors that depend on the path: `rates`, `layer_decay` (arXiv 1801.06146 section 3.2), LoRA+
    (arXiv 2402.12354), and 0 until a block is unfrozen (gradual unfreezing, arXiv 1801.06146 section 3.3). It is the
    identity if none of them is set.
    """
    unscaled = options.layer_decay == 1 and options.b_rate == 1 and not options.rates
    if unscaled and not options.unfreeze_every:
        return optax.identity()

    def update(updates: Any, state: ScaleByPathState, params: Any = None) -> Any:
        leaves = paths.flat(updates)
        from_top = blocks_above(leaves)
        scaled = {
            path: leaf
            * rate_factor(path, from_top[path], options)
            * (state.step >= options.unfreeze_every * (from_top[path] or 0))
            for path, leaf in leaves.items()
        }
        return paths.nested(scaled), ScaleByPathState(state.step + 1)

    return optax.GradientTransformation(lambda params: ScaleByPathState(jnp.zeros((), jnp.int32)), update)


def rate_factor(path: str, from_top: int | None, options: Any) -> float:
    """Returns the factor of a parameter's learning rate."""
    by_rule = next((rate for rule, rate in options.rates if re.search(rule, path)), 1.0)
    by_depth = options.layer_decay ** (from_top or 0)
    return float(by_rule * by_depth * (options.b_rate if path.endswith("/lora_b") else 1.0))


def blocks_above(leaves: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the number of blocks above each parameter's block; for embeddings the number of all; None for heads."""
    depths = {path: paths.depth(path) for path in leaves}
    count = max((depth for depth in depths.values() if depth is not None), default=-1) + 1

    def distance(path: str, depth: int | None) -> int | None:
        if depth is not None:
            return count - 1 - depth
        return count if re.search(r"(^|/)(tokens|positions|embedding_norm|types)(/|$)", path) else None

    return {path: distance(path, depth) for path, depth in depths.items()}


# Gradients of penalties that depend on the parameters alone.


def l2_sp(factor: float) -> optax.GradientTransformation:
    """Adds factor * (p - its first value), the gradient of L2-SP (arXiv 1802.01483 eq. 2), to gradients."""

    def update(updates: Any, start: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g, p, first: g + factor * (p - first), updates, params, start), start

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.array, params), update)


class EwcState(NamedTuple):
    """Initial parameters and the diagonal of their Fisher information: trees of the trainable parameters."""

    start: Any
    fisher: Any


def ewc(factor: float) -> optax.GradientTransformation:
    """Adds factor * F (p - its first value), the gradient of EWC's penalty (arXiv 1612.00796 eq. 3), to gradients.

    F is 0 until `with_fisher` sets it.
    """

    def init(params: Any) -> EwcState:
        return EwcState(jax.tree.map(jnp.array, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: EwcState, params: Any = None) -> Any:
        def add_penalty(g: jax.Array, p: jax.Array, first: jax.Array, fisher: jax.Array) -> jax.Array:
            return g + factor * fisher * (p - first)

        return jax.tree.map(add_penalty, updates, params, *state), state

    return optax.GradientTransformation(init, update)


def with_fisher(opt_state: Any, fisher: Flat) -> Any:
    """Sets the Fisher information, by path, in the state of `ewc`; it stays 0 for parameters that have none."""

    def set_fisher(node: Any) -> Any:
        if not isinstance(node, EwcState):
            return node
        return node._replace(fisher=paths.nested(paths.flat(node.fisher) | fisher))

    return jax.tree.map(set_fisher, opt_state, is_leaf=lambda node: isinstance(node, EwcState))


def orthogonality_penalty(factor: float) -> optax.GradientTransformation:
    """Adds the gradient of factor * sum of |P^T P - I|^2 + |Q Q^T - I|^2 (arXiv 2303.10512 eq. 4) to gradients."""

    def penalty(leaves: Flat) -> jax.Array:
        total = jnp.zeros(())
        for path, leaf in leaves.items():
            if path.endswith("/lora_a"):
                total += squared_distance_to_identity(jnp.einsum("...dr,...ds->...rs", leaf, leaf))
            if path.endswith("/lora_b"):
                total += squared_distance_to_identity(jnp.einsum("...rf,...sf->...rs", leaf, leaf))
        return total

    def update(updates: Any, params: Any) -> Any:
        gradient = paths.nested(jax.grad(penalty)(paths.flat(params)))
        return jax.tree.map(lambda g, p: g + factor * p, updates, gradient)

    return optax.stateless(update)


def squared_distance_to_identity(gram: jax.Array) -> jax.Array:
    """Computes |G - I|^2, summed over all matrices."""
    return jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2)


# AdaLoRA.


class AdaLoraState(NamedTuple):
    """State of `adalora`.

    Attributes:
      step: number of steps so far.
      mean, uncertainty: of each element's sensitivity, by path.
      kept: mask of the ranks of each matrix that are kept, by the path of its `lora_e`.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    mean: Any
    uncertainty: Any
    kept: Any
    inner: Any


def rank_budget(step: Any, first: int, last: int, warmup: int, final: int, steps: int) -> jax.Array:
    """Returns the number of ranks after a step: `first`, a cubic decay, then `last` (arXiv 2303.10512 eq. 12)."""
    progress = jnp.clip((step - warmup) / max(steps - warmup - final, 1), 0, 1)
    return jnp.round(last + (first - last) * (1 - progress) ** 3).astype(jnp.int32)


def adalora(
    inner: optax.GradientTransformationExtraArgs, options: Any, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer with AdaLoRA's allocation of ranks (arXiv 2303.10512 algorithm 1).

    Every `every_steps` the least important ranks of all matrices are set to 0, so that exactly `rank_budget` are left.
    They may grow again in between, but not in the last `final_steps`, in which the allocation is fixed.
    """
    c = options.adalora

    def lora(tree: Any) -> Flat:
        return {path: leaf for path, leaf in paths.flat(tree).items() if path.rsplit("/", 1)[-1].startswith("lora_")}

    def init(params: Any) -> AdaLoraState:
        leaves = lora(params)
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}
        masks = {path: jnp.ones(leaf.shape, bool) for path, leaf in leaves.items() if path.endswith("/lora_e")}
        return AdaLoraState(jnp.zeros((), jnp.int32), zeros, dict(zeros), masks, inner.init(params))

    def update(updates: Any, state: AdaLoraState, params: Any = None, **extra: Any) -> tuple[Any, AdaLoraState]:
        factors, grads, step = lora(params), lora(updates), state.step + 1
        sensitivity = {path: jnp.abs(leaf * grads[path]) for path, leaf in factors.items()}
        mean = {path: c.beta1 * state.mean[path] + (1 - c.beta1) * sensitivity[path] for path in factors}
        uncertainty = {
            path: c.beta2 * state.uncertainty[path] + (1 - c.beta2) * jnp.abs(sensitivity[path] - mean[path])
            for path in factors
        }
        importance = rank_importance({path: mean[path] * uncertainty[path] for path in factors})
        ranks = sum(leaf.size for leaf in state.kept.values())
        last = ranks // c.first_rank * options.rank
        budget = rank_budget(step, ranks, last, c.warmup_steps, c.final_steps, steps)
        end = steps - c.final_steps
        reallocates = (step >= c.warmup_steps) & (step < end) & (step % c.every_steps == 0) | (step == end)
        selected = top_ranks(importance, budget)
        masks = {path: jnp.where(reallocates, selected[path], state.kept[path]) for path in selected}
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        flat, leaves = paths.flat(updates), paths.flat(params)
        for path, mask in masks.items():  # the others become 0
            flat[path] = jnp.where(mask | ~(reallocates | (step > end)), flat[path], -leaves[path])
        return paths.nested(flat), AdaLoraState(step, mean, uncertainty, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def rank_importance(sensitivity: Flat) -> Flat:
    """Computes the importance of ranks: the singular value's, plus means of P's column and Q's row (eq. 6-7)."""
    result = {}
    for path, singular in sensitivity.items():
        if path.endswith("/lora_e"):
            name = path.removesuffix("lora_e")
            result[path] = singular + sensitivity[name + "lora_a"].mean(-2) + sensitivity[name + "lora_b"].mean(-1)
    return result


def top_ranks(importance: Flat, count: jax.Array) -> Flat:
    """Returns masks that are True for exactly the `count` most important of all ranks."""
    names, sizes = list(importance), [leaf.size for leaf in importance.values()]
    joined = jnp.concatenate([importance[name].reshape(-1) for name in names])
    order = jnp.zeros(joined.shape, jnp.int32).at[jnp.argsort(-joined)].set(jnp.arange(joined.size))
    parts = jnp.split(order < count, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])
    return {name: part.reshape(importance[name].shape) for name, part in zip(names, parts, strict=True)}
