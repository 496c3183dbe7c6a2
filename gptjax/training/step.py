"""The train step, `(state, batch) -> (state, metrics)`: a pure function that the loop compiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import objectives, sharding
from gptjax.config import options
from gptjax.core import rng
from gptjax.finetune import methods
from gptjax.finetune.paths import union
from gptjax.finetune.quantization import dequantize
from gptjax.models import kernels
from gptjax.models.layers import is_zero
from gptjax.objectives import normalize_weights
from gptjax.objectives.objective import Loss
from gptjax.optim import skip_step as guards
from gptjax.runs.train_state import TrainState
from gptjax.training.monitoring import run_stats

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def split_microbatches(batch: Any, accumulation_steps: int, mesh: Mesh) -> Any:
    """Splits [B, ...] into microbatches [A, B/A, ...], each sharded over all devices."""

    def split(name: str, x: jax.Array) -> jax.Array:
        # Microbatch a takes rows a, a + A, ..., so that rows stay on their devices.
        x = x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)
        if mesh.size == 1:  # also within a population, whose members are on different devices of a larger mesh
            return x
        return jax.lax.with_sharding_constraint(x, sharding.batch_shardings(mesh, {name: x}, leading=1)[name])

    return {name: split(name, x) for name, x in batch.items()}


def gradients(
    objective: Loss, params: Any, batch: Any, rng: jax.Array | None, accumulation_steps: int, mesh: Mesh
) -> Any:
    """Returns metrics and gradients of a batch with normalized weights, accumulated over microbatches by a scan."""

    def of_microbatch(microbatch: Any, rng: jax.Array | None) -> tuple[dict[str, jax.Array], Any]:
        grads, metrics = jax.grad(objective, has_aux=True)(params, microbatch, rng)
        return metrics, grads

    if accumulation_steps == 1:
        return of_microbatch(batch, rng)

    def add(total: Any, indexed: Any) -> tuple[Any, None]:
        index, microbatch = indexed
        microbatch_rng = None if rng is None else jax.random.fold_in(rng, index)
        update = of_microbatch(microbatch, microbatch_rng)
        with jax.named_scope("accumulation"):
            return jax.tree.map(jnp.add, total, update), None

    microbatches = split_microbatches(batch, accumulation_steps, mesh)
    shapes = jax.eval_shape(of_microbatch, jax.tree.map(lambda x: x[0], microbatches), rng)
    with jax.named_scope("accumulation"):
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zero, (jnp.arange(accumulation_steps), microbatches))[0]


def microbatch_loss(
    objective: Loss, batch: Any, rng: jax.Array | None, accumulation_steps: int, mesh: Mesh
) -> Callable[[Any], jax.Array]:
    """Returns a function `params -> loss` of the first microbatch, scaled by the number of microbatches.

    For optimizers that need more than a gradient, such as Sophia's curvature estimate on a part of the batch (arXiv
    2305.14342, section 2.3). It costs nothing unless it is called.
    """

    def loss(params: Any) -> jax.Array:
        microbatch, microbatch_rng = batch, rng
        if accumulation_steps > 1:
            microbatch = jax.tree.map(lambda x: x[0], split_microbatches(batch, accumulation_steps, mesh))
            microbatch_rng = None if rng is None else jax.random.fold_in(rng, 0)
        # Not divided by the microbatch's own weight, which may be 0.
        return objective(params, microbatch, microbatch_rng)[0] * accumulation_steps

    return loss


def with_frozen(objective: Loss, frozen: Any) -> Loss:
    """Returns the objective as a function of the trained parameters only, with the frozen ones fixed."""
    return lambda tuned, batch, rng: objective(union(dequantize(frozen), tuned), batch, rng)


def train_step(
    objective: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    seed: int,
    dropout: bool = False,
    accumulation_steps: int = 1,
    limits: guards.GuardOptions = guards.DEFAULT,
    statistics_every: int = 0,
    curvature: Loss | None = None,
) -> Step:
    """Makes the train step.

    Args:
      objective: see gptjax.objectives.
      optimizer: turns a mean gradient into an update; it is passed `obj_fn`, see `microbatch_loss`.
      mesh: of state and batches.
      seed: of the run; dropout is a function of seed and step.
      dropout: passes a random key to the objective.
      accumulation_steps: A, number of microbatches that are differentiated one after the other.
      limits: define bad steps, which leave parameters and optimizer state unchanged.
      statistics_every: steps between measurements of parameters and updates; 0: never.
      curvature: a twice differentiable version of the objective, see `twice_differentiable`; None: the objective.

    Returns:
      `(state, batch) -> (state, metrics)`. The metrics are those of the objective, such as "loss", and "grad_norm",
      all before the update, those of gptjax.optim.skip_step, and those of run_stats.step_statistics.
    """

    curved = sharding.shard_rows(curvature or objective, mesh)
    objective = sharding.shard_rows(objective, mesh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = normalize_weights(batch)
        dropout_key = rng.key(seed, "dropout", state.step) if dropout else None
        of_tuned = with_frozen(objective, state.frozen)
        metrics, grads = gradients(of_tuned, state.params, batch, dropout_key, accumulation_steps, mesh)
        loss = microbatch_loss(with_frozen(curved, state.frozen), batch, dropout_key, accumulation_steps, mesh)

        def update(old: Any, grads: Any) -> Any:
            updates, opt_state = optimizer.update(grads, old[1], old[0], obj_fn=loss)
            return optax.apply_updates(old[0], updates), opt_state

        with jax.named_scope("optimizer"):  # profiles and cost tables find its operations by this name
            norm = optax.tree.norm(grads)
            bad, guard, verdict = guards.check_step(state.guard, metrics["loss"], norm, limits)
            params, opt_state = guards.skip_update_if(bad, update, (state.params, state.opt_state), grads)
            measured = run_stats.step_statistics(state.params, params, state.step + 1, statistics_every)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, guard=guard)
        return state, metrics | {"grad_norm": norm} | verdict | measured

    return step


def twice_differentiable(config: ConfigDict, objective: Loss, mesh: Mesh) -> Loss:
    """Returns the objective with kernels whose gradients can be differentiated again, on this mesh."""
    name = kernels.resolve_kernels(config.model.kernels, sharding.sharded_dimensions(mesh))
    if name not in kernels.TWICE_DIFFERENTIABLE:
        return objective
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.kernels = kernels.TWICE_DIFFERENTIABLE[name]
    return objectives.loss(config, methods.build_model(config))


def uses_dropout(config: ConfigDict) -> bool:
    """Returns True if a step of this config draws dropout masks, for the model or for fine-tuning's additions."""
    return not (is_zero(config.model.dropout) and is_zero(config.finetune.dropout))


def train_step_of(
    config: ConfigDict, objective: Loss, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> Step:
    """Makes the train step of a config, not yet jitted.

    Args:
      config: resolved, with its vocabulary; its numbers may be traced.
      objective, optimizer: of the config.
      mesh: of state and batches.
    """
    c, limits = config, options.parse(guards.GuardOptions, config.guard)
    curvature = twice_differentiable(c, objective, mesh)
    dropout, accumulation_steps = uses_dropout(c), c.train.grad_accumulation
    return train_step(
        objective, optimizer, mesh, c.seed, dropout, accumulation_steps, limits, c.log.statistics, curvature
    )


def make_train_step(
    config: ConfigDict,
    objective: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    shapes: TrainState,
) -> jax.stages.Wrapped:
    """Makes the jitted train step of a config; see `train_step_of`.

    Args:
      config, objective, optimizer, mesh: see `train_step_of`.
      shapes: of the state.
    """
    options = kernels.compiler_options(config.model, config.train.dtype) | sharding.compiler_options(mesh)
    return jit_step(train_step_of(config, objective, optimizer, mesh), mesh, shapes, options)


def jit_step(step: Step, mesh: Mesh, shapes: TrainState, options: dict[str, str] | None = None) -> jax.stages.Wrapped:
    """Jits a train step with the shardings of state and metrics; the old state is donated.

    Args:
      step: from `train_step`.
      mesh: of state and batches.
      shapes: of the state.
      options: compiler options of XLA, by name.
    """
    shardings = sharding.state_shardings(mesh, shapes)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None),  # batches keep the sharding of gptjax.sharding.place_batch
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=options or None,
    )
