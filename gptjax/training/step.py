"""One step: `(state, batch) -> (state, metrics)`. Pure; the loop compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import objectives, sharding
from gptjax.core import rng
from gptjax.finetune import methods
from gptjax.finetune.paths import union
from gptjax.finetune.quantised import dequantised
from gptjax.models import kernels
from gptjax.models.layers import is_zero
from gptjax.objectives import normalize_weights
from gptjax.objectives.objective import Loss
from gptjax.optim import skip_step as guards
from gptjax.runs.train_state import TrainState
from gptjax.training.monitoring import run_stats

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def sliced(batch: Any, slices: int, mesh: Mesh) -> Any:
    """[B, ...] -> [A, B/A, ...], each slice spread over all devices."""

    def cut(name: str, x: jax.Array) -> jax.Array:
        # Slice a takes rows a, a + A, ...: rows stay on the devices that have them.
        x = x.reshape(x.shape[0] // slices, slices, *x.shape[1:]).swapaxes(0, 1)
        if mesh.size == 1:  # also a part of a larger one, which has members of a population on its devices
            return x
        return jax.lax.with_sharding_constraint(x, sharding.of_batch(mesh, {name: x}, leading=1)[name])

    return {name: cut(name, x) for name, x in batch.items()}


def gradients(objective: Loss, params: Any, batch: Any, rng: jax.Array | None, slices: int, mesh: Mesh) -> Any:
    """The objective's metrics and the loss's gradient, in `slices` added by a scan, of a batch that was shared out."""

    def of_slice(piece: Any, rng: jax.Array | None) -> tuple[dict[str, jax.Array], Any]:
        grads, metrics = jax.grad(objective, has_aux=True)(params, piece, rng)
        return metrics, grads

    if slices == 1:
        return of_slice(batch, rng)

    def add(total: Any, indexed: Any) -> tuple[Any, None]:
        index, piece = indexed
        own = None if rng is None else jax.random.fold_in(rng, index)
        found = of_slice(piece, own)
        with jax.named_scope("accumulation"):
            return jax.tree.map(jnp.add, total, found), None

    pieces = sliced(batch, slices, mesh)
    shapes = jax.eval_shape(of_slice, jax.tree.map(lambda x: x[0], pieces), rng)
    with jax.named_scope("accumulation"):
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(slices), pieces))[0]


def loss_of_slice(
    objective: Loss, batch: Any, rng: jax.Array | None, slices: int, mesh: Mesh
) -> Callable[[Any], jax.Array]:
    """The loss of the batch's first slice, times the slices there are, as a function of the parameters: for optimizers
    that ask for more than a gradient (as arXiv 2305.14342 section 2.3 does of a part of the batch). Costs nothing where
    it is not called.
    """

    def mean(params: Any) -> jax.Array:
        piece, own = batch, rng
        if slices > 1:
            piece = jax.tree.map(lambda x: x[0], sliced(batch, slices, mesh))
            own = None if rng is None else jax.random.fold_in(rng, 0)
        return objective(params, piece, own)[0] * slices  # not by its own weight, since a slice may have none

    return mean


def with_frozen(objective: Loss, frozen: Any) -> Loss:
    """The objective as a function of what trains alone, beside what does not."""
    return lambda tuned, batch, rng: objective(union(dequantised(frozen), tuned), batch, rng)


def train_step(
    objective: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    seed: int,
    dropout: bool = False,
    slices: int = 1,
    limits: guards.Limits = guards.DEFAULT,
    statistics_every: int = 0,
    curvature: Loss | None = None,
) -> Step:
    """The step that training repeats.

    Args:
      objective: see gptjax.objectives.
      optimizer: turns a mean gradient into an update; it is told `obj_fn`, see `loss_of_slice`.
      mesh: where state and batches lie.
      seed: of the run; dropout at a step is a function of both.
      dropout: whether the objective gets a random key.
      slices: A, how many pieces of the batch are differentiated one after the other.
      limits: which steps are bad and leave parameters and optimizer as they were.
      statistics_every: steps between those that measure parameters and updates; 0: none does.
      curvature: the same objective where it is differentiated twice, see `twice_differentiable`; None: itself.

    Returns:
      `(state, batch) -> (state, metrics)`: the objective's, such as "loss", and "grad_norm", all before the update,
      those of `guard.judged`, and those of `statistics.of_step`.
    """

    curved = sharding.over_rows(curvature or objective, mesh)
    objective = sharding.over_rows(objective, mesh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = normalize_weights(batch)
        dropout_key = rng.key(seed, "dropout", state.step) if dropout else None
        of_tuned = with_frozen(objective, state.frozen)
        metrics, grads = gradients(of_tuned, state.params, batch, dropout_key, slices, mesh)
        loss = loss_of_slice(with_frozen(curved, state.frozen), batch, dropout_key, slices, mesh)

        def update(old: Any, grads: Any) -> Any:
            updates, opt_state = optimizer.update(grads, old[1], old[0], obj_fn=loss)
            return optax.apply_updates(old[0], updates), opt_state

        with jax.named_scope("optimizer"):  # by which profiles and cost tables know its operations
            norm = optax.tree.norm(grads)
            bad, guard, verdict = guards.judged(state.guard, metrics["loss"], norm, limits)
            params, opt_state = guards.skip_update_if(bad, update, (state.params, state.opt_state), grads)
            measured = run_stats.of_step(state.params, params, state.step + 1, statistics_every)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, guard=guard)
        return state, metrics | {"grad_norm": norm} | verdict | measured

    return step


def twice_differentiable(config: ConfigDict, objective: Loss, mesh: Mesh) -> Loss:
    """The objective of a run's config with kernels whose gradients have derivatives too, on that mesh."""
    name = kernels.resolve_kernels(config.model.kernels, sharding.divided(mesh))
    if name not in kernels.TWICE_DIFFERENTIABLE:
        return objective
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.kernels = kernels.TWICE_DIFFERENTIABLE[name]
    return objectives.loss(config, methods.model_of(config))


def drops_out(config: ConfigDict) -> bool:
    """Whether a step of this config draws what is dropped: of the model, or of what fine-tuning adds to it."""
    return not (is_zero(config.model.dropout) and is_zero(config.finetune.dropout))


def of_config(
    config: ConfigDict, objective: Loss, optimizer: optax.GradientTransformation, mesh: Mesh, shapes: TrainState
) -> jax.stages.Wrapped:
    """The step that a run of this config repeats, ready to be compiled for batches of its shapes.

    `shapes`: of the state.
    """
    c = config
    dropout, slices = drops_out(c), c.train.grad_accumulation
    options = kernels.compiler_options(c.model, c.train.dtype) | sharding.compiler_options(mesh)
    limits = guards.Limits(**c.guard)
    curvature = twice_differentiable(c, objective, mesh)
    step = train_step(objective, optimizer, mesh, c.seed, dropout, slices, limits, c.log.statistics, curvature)
    return jitted(step, mesh, shapes, options)


def jitted(step: Step, mesh: Mesh, shapes: TrainState, options: dict[str, str] | None = None) -> jax.stages.Wrapped:
    """The compiled step: the old state's memory becomes the new one's, and results are pinned to their places.

    Args:
      step: as `train_step` gives it.
      mesh: where state and batches lie.
      shapes: of the state.
      options: told to XLA's compiler, by name.
    """
    there = sharding.of_state(mesh, shapes)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(there, None),  # batches lie as gptjax.sharding.place puts them
        out_shardings=(there, sharding.replicated(mesh)),
        compiler_options=options or None,
    )
