"""What fine-tuning does to an optimizer's updates: rates by path, pulls to the start, AdaLoRA's budget of ranks.

Each is an optax transformation, of trees of what trains; the loss knows none of them.
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
    """A run's optimizer with what its `config.finetune` asks for besides."""
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


# Rates.


class ScaleByPathState(NamedTuple):
    """Steps taken."""

    step: jax.Array


def scale_by_path(options: Any) -> optax.GradientTransformation:
    """Updates times factors by path: `rates`, `layer_decay` (arXiv 1801.06146 section 3.2), LoRA+'s (2402.12354); and
    0 until it is a block's turn (gradual unfreezing, arXiv 1801.06146 section 3.3). The identity where none is asked
    for.
    """
    plain = options.layer_decay == 1 and options.b_rate == 1 and not options.rates
    if plain and not options.unfreeze_every:
        return optax.identity()

    def update(updates: Any, state: ScaleByPathState, params: Any = None) -> Any:
        leaves = paths.flat(updates)
        from_top = blocks_above(leaves)
        found = {
            path: leaf
            * rate_factor(path, from_top[path], options)
            * (state.step >= options.unfreeze_every * (from_top[path] or 0))
            for path, leaf in leaves.items()
        }
        return paths.nested(found), ScaleByPathState(state.step + 1)

    return optax.GradientTransformation(lambda params: ScaleByPathState(jnp.zeros((), jnp.int32)), update)


def rate_factor(path: str, from_top: int | None, options: Any) -> float:
    """What a parameter's learning rate is multiplied with."""
    named = next((rate for rule, rate in options.rates if re.search(rule, path)), 1.0)
    decayed = options.layer_decay ** (from_top or 0)
    return float(named * decayed * (options.b_rate if path.endswith("/lora_b") else 1.0))


def blocks_above(leaves: Mapping[str, Any]) -> dict[str, int | None]:
    """How many blocks are above each parameter's own; of tables of words and positions all, and one; None: of heads."""
    depths = {path: paths.depth(path) for path in leaves}
    count = max((depth for depth in depths.values() if depth is not None), default=-1) + 1

    def distance(path: str, depth: int | None) -> int | None:
        if depth is not None:
            return count - 1 - depth
        return count if re.search(r"(^|/)(tokens|positions|embedding_norm|types)(/|$)", path) else None

    return {path: distance(path, depth) for path, depth in depths.items()}


# Pulls: gradients of penalties that depend on parameters alone.


def l2_sp(factor: float) -> optax.GradientTransformation:
    """factor * (p - its first value), the gradient of L2-SP (arXiv 1802.01483 eq. 2), added to gradients."""

    def update(updates: Any, start: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g, p, first: g + factor * (p - first), updates, params, start), start

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.array, params), update)


class EwcState(NamedTuple):
    """Where parameters began, and how much what is to be remembered depends on each: trees of what trains."""

    start: Any
    fisher: Any


def ewc(factor: float) -> optax.GradientTransformation:
    """factor * F (p - its first value) added to gradients: the gradient of EWC's penalty (arXiv 1612.00796 eq. 3).

    F is 0 until `with_fisher` fills it in.
    """

    def init(params: Any) -> EwcState:
        return EwcState(jax.tree.map(jnp.array, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: EwcState, params: Any = None) -> Any:
        def pulled(g: jax.Array, p: jax.Array, first: jax.Array, fisher: jax.Array) -> jax.Array:
            return g + factor * fisher * (p - first)

        return jax.tree.map(pulled, updates, params, *state), state

    return optax.GradientTransformation(init, update)


def with_fisher(opt_state: Any, found: Flat) -> Any:
    """An optimizer's state in which `elastic` has the Fisher information, by path; it stays 0 where there is none."""

    def filled(node: Any) -> Any:
        if not isinstance(node, EwcState):
            return node
        return node._replace(fisher=paths.nested(paths.flat(node.fisher) | found))

    return jax.tree.map(filled, opt_state, is_leaf=lambda node: isinstance(node, EwcState))


def orthogonality_penalty(factor: float) -> optax.GradientTransformation:
    """The gradient of factor * sum of |P^T P - I|^2 + |Q Q^T - I|^2 (arXiv 2303.10512 eq. 4) added to gradients."""

    def penalty(leaves: Flat) -> jax.Array:
        total = jnp.zeros(())
        for path, leaf in leaves.items():
            if path.endswith("/lora_a"):
                total += squared_distance_to_identity(jnp.einsum("...dr,...ds->...rs", leaf, leaf))
            if path.endswith("/lora_b"):
                total += squared_distance_to_identity(jnp.einsum("...rf,...sf->...rs", leaf, leaf))
        return total

    def update(updates: Any, params: Any) -> Any:
        pull = paths.nested(jax.grad(penalty)(paths.flat(params)))
        return jax.tree.map(lambda g, p: g + factor * p, updates, pull)

    return optax.stateless(update)


def squared_distance_to_identity(gram: jax.Array) -> jax.Array:
    """|G - I|^2, summed over all matrices."""
    return jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2)


# AdaLoRA.


class AdaLoraState(NamedTuple):
    """What decides which ranks stay.

    Attributes:
      step: steps taken.
      mean, uncertainty: of each number's sensitivity, by path.
      kept: of each matrix's ranks, whether it is among those that stay, by the path of its `lora_e`.
      inner: the optimizer's own state.
    """

    step: jax.Array
    mean: Any
    uncertainty: Any
    kept: Any
    inner: Any


def rank_budget(step: Any, first: int, last: int, warmup: int, final: int, steps: int) -> jax.Array:
    """How many ranks are left after a step: `first`, then down a cubic curve, then `last` (arXiv 2303.10512 eq. 12)."""
    share = jnp.clip((step - warmup) / max(steps - warmup - final, 1), 0, 1)
    return jnp.round(last + (first - last) * (1 - share) ** 3).astype(jnp.int32)


def adalora(
    inner: optax.GradientTransformationExtraArgs, options: Any, steps: int
) -> optax.GradientTransformationExtraArgs:
    """AdaLoRA's choice of ranks (arXiv 2303.10512 algorithm 1) around an optimizer.

    Every `every_steps` the ranks of all matrices that matter least are set to 0, so that exactly `budget` are left;
    in between they may grow again, but for the last `final_steps`, in which the choice stays.
    """
    c = options.adalora

    def lora(tree: Any) -> Flat:
        return {path: leaf for path, leaf in paths.flat(tree).items() if path.rsplit("/", 1)[-1].startswith("lora_")}

    def init(params: Any) -> AdaLoraState:
        own = lora(params)
        zeros = {path: jnp.zeros_like(leaf) for path, leaf in own.items()}
        kept = {path: jnp.ones(leaf.shape, bool) for path, leaf in own.items() if path.endswith("/lora_e")}
        return AdaLoraState(jnp.zeros((), jnp.int32), zeros, dict(zeros), kept, inner.init(params))

    def update(updates: Any, state: AdaLoraState, params: Any = None, **extra: Any) -> tuple[Any, AdaLoraState]:
        own, grads, step = lora(params), lora(updates), state.step + 1
        now = {path: jnp.abs(leaf * grads[path]) for path, leaf in own.items()}
        mean = {path: c.beta1 * state.mean[path] + (1 - c.beta1) * now[path] for path in own}
        uncertainty = {
            path: c.beta2 * state.uncertainty[path] + (1 - c.beta2) * jnp.abs(now[path] - mean[path]) for path in own
        }
        matters = rank_importance({path: mean[path] * uncertainty[path] for path in own})
        ranks = sum(leaf.size for leaf in state.kept.values())
        last = ranks // c.first_rank * options.rank
        left = rank_budget(step, ranks, last, c.warmup_steps, c.final_steps, steps)
        ends = steps - c.final_steps
        chooses = (step >= c.warmup_steps) & (step < ends) & (step % c.every_steps == 0) | (step == ends)
        chosen = top_ranks(matters, left)
        kept = {path: jnp.where(chooses, chosen[path], state.kept[path]) for path in chosen}
        updates, own_state = inner.update(updates, state.inner, params, **extra)
        flat, leaves = paths.flat(updates), paths.flat(params)
        for path, keep in kept.items():  # what is not kept becomes 0
            flat[path] = jnp.where(keep | ~(chooses | (step > ends)), flat[path], -leaves[path])
        return paths.nested(flat), AdaLoraState(step, mean, uncertainty, kept, own_state)

    return optax.GradientTransformationExtraArgs(init, update)


def rank_importance(sensitivity: Flat) -> Flat:
    """Of each rank: that of its number in the middle, and the means of its column of P and row of Q (eq. 6-7)."""
    found = {}
    for path, middle in sensitivity.items():
        if path.endswith("/lora_e"):
            name = path.removesuffix("lora_e")
            found[path] = middle + sensitivity[name + "lora_a"].mean(-2) + sensitivity[name + "lora_b"].mean(-1)
    return found


def top_ranks(matters: Flat, count: jax.Array) -> Flat:
    """True for so many of all ranks, exactly: those that matter most."""
    names, sizes = list(matters), [leaf.size for leaf in matters.values()]
    joined = jnp.concatenate([matters[name].reshape(-1) for name in names])
    place = jnp.zeros(joined.shape, jnp.int32).at[jnp.argsort(-joined)].set(jnp.arange(joined.size))
    parts = jnp.split(place < count, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])
    return {name: part.reshape(matters[name].shape) for name, part in zip(names, parts, strict=True)}
