"""Populations: runs that are trained together. A single run is a population of one.

Several members differ only in numbers and are one compiled program, with an axis of members, [N, ...], that a single
run does not have. They read one stream of batches, or one each where their data seeds differ, and leave ordinary run
directories, as if each had been trained alone. gptjax.training.population.members decides which keys may differ, and
gptjax.sharding places the members on devices.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gptjax import models, sharding
from gptjax.config.errors import ConfigError
from gptjax.core import console, rng
from gptjax.data import batches
from gptjax.evals import held_out
from gptjax.models import kernels
from gptjax.runs import checkpoint_dir, integrity
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.training import memory, recovery
from gptjax.training.monitoring import metrics
from gptjax.training.population import evolution as evolutions
from gptjax.training.population import members
from gptjax.training.population.evolution import Evolution
from gptjax.training.population.members import Members, Values
from gptjax.training.setup import TrainSetup, batch_seed, train_setup
from gptjax.training.state import init_fn, init_or_restore_state
from gptjax.training.step import make_train_step

# `(values, state, batch, left out) -> (state, metrics)` of all members.
PopulationStep = Callable[..., tuple[TrainState, dict[str, Any]]]


class Population(NamedTuple):
    """What does not change while the members train.

    Attributes:
      setups: of the members.
      members: the numbers in which they differ.
      shared: True if all members read the same batches.
      evaluate_all: `(parameters, batches, advance) -> metrics of each member`, see gptjax.evals.held_out.evaluate.
      evolution: population-based training; None: members train independently.
    """

    setups: list[TrainSetup]
    members: Members
    shared: bool
    evaluate_all: Callable[..., list[dict[str, float]]]
    evolution: Evolution | None = None

    @property
    def first(self) -> TrainSetup:
        """The set-up whose data, model shapes and settings all members share."""
        return self.setups[0]

    @property
    def size(self) -> int:
        """Number of members, N."""
        return len(self.setups)

    def select(self, tree: Any, member: int) -> Any:
        """Selects one member of a tree of arrays [N, ...], which have no such axis if there is only one."""
        return tree if self.size == 1 else jax.tree.map(lambda leaf: leaf[member], tree)

    def map(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of one member's arrays over all members."""
        return f if self.size == 1 else jax.vmap(f)


def check(
    resolved: Sequence[ConfigDict], unresolved: Sequence[ConfigDict] = (), evolution: Evolution | None = None
) -> None:
    """Raises ConfigError for configs that cannot be trained as one population."""
    traced = members.from_configs(resolved, unresolved)
    memory.check_config(resolved[0], len(resolved))
    if evolution:
        evolutions.check(evolution, traced.values, len(resolved))
    c = resolved[0]
    if c.init_from:
        raise ConfigError("a population starts from random parameters; leave init_from or --vmap out")
    if jax.process_count() > 1:
        raise ConfigError("a population trains in one process; leave --vmap out, or share a study between processes")
    if c.objective.teacher:
        raise ConfigError("a population has no teacher; leave objective.teacher or --vmap out")
    if math.prod(size for size in c.mesh.values() if size > 0) > 1:
        raise ConfigError("each member of a population is on one device; leave config.mesh or --vmap out")


def of_one(setup: TrainSetup) -> Population:
    """Makes the population of a single run."""

    def evaluate_one(params: Any, eval_batches: Iterable[Any], advance: Callable[..., None]) -> list[dict[str, float]]:
        return [setup.evaluate(params, eval_batches, advance=advance)]

    return Population([setup], Members(setup.config, {}), shared=True, evaluate_all=evaluate_one)


def build_population(
    resolved: Sequence[ConfigDict], all_workdirs: Sequence[Path], started: float, evolution: Evolution | None
) -> Population:
    """Builds the set-ups of all members, which share the loaded data and resume from the same step."""
    first = train_setup(on_one_device(resolved[0]), all_workdirs[0], started, members=len(resolved))
    others = [
        train_setup(on_one_device(config), where, started, loaded=first.data)
        for config, where in zip(resolved[1:], all_workdirs[1:], strict=True)
    ]
    setups = [first, *others]
    step = newest_common_step([setup.workdir for setup in setups])
    setups = [setup._replace(clock=first.clock, resumes_at=step) for setup in setups]
    shared = len({batch_seed(setup.config) for setup in setups}) == 1
    traced = members.from_configs([setup.config for setup in setups])
    evaluate_all = partial(evaluate_members, first, make_eval_step(first, len(setups)), len(setups))
    return Population(setups, traced, shared, evaluate_all, evolution)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """Returns the config with a single-device mesh, as each member has."""
    return members.with_values(config, {"mesh.data": 1})


def newest_common_step(all_workdirs: Sequence[Path], before: float = math.inf) -> int:
    """Newest step before `before` of which every member has an undamaged checkpoint; 0 if there is none."""
    there = [set(checkpoint_dir.steps(where / "checkpoints")) for where in all_workdirs]
    for step in sorted(set.intersection(*there), reverse=True):
        if step < before and all(is_intact(where / "checkpoints", step) for where in all_workdirs):
            return step
    return 0


def is_intact(directory: Path, step: int) -> bool:
    """Returns True if the files of a checkpoint match their digests."""
    return not integrity.problem(directory / str(step), "", checkpoint_dir.CHANGING)


def init_or_restore(population: Population, written: Sequence[Checkpoints]) -> TrainState:
    """Restores or initializes the states of all members on the devices, and logs what is trained."""
    setup, count = population.first, population.size
    if count == 1:
        state = init_or_restore_state(setup, written[0])
        written[0].quarantine_after(setup.resumes_at)
    else:
        state = init_or_restore_states(population, written)
        for checkpoints in written:
            checkpoints.delete_after(setup.resumes_at)  # a step that other members may not have
    log_model(population, state)
    return state


def init_or_restore_states(population: Population, written: Sequence[Checkpoints]) -> TrainState:
    """Restores or initializes the states of several members, [N, ...]."""
    setup, count = population.first, population.size
    there = sharding.member_sharding(count)
    if not setup.resumes_at:
        make = jax.vmap(partial(members.init_member_state, setup.config), axis_size=count)
        return jax.jit(make, out_shardings=there)(member_values(population))
    shapes = shapes_on(jax.eval_shape(init_fn(setup)), sharding.replicated(setup.parts.mesh))
    restored = [checkpoints.restore(shapes, setup.resumes_at) for checkpoints in written]
    console.say(f"resuming   {count} members at step {setup.resumes_at:,} of {setup.config.train.steps:,}")
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *restored), there)


def log_model(population: Population, state: TrainState) -> None:
    """Logs model, devices and kernels."""
    setup, kind = population.first, jax.devices()[0].device_kind
    c, count = setup.config, population.size
    shapes: TrainState = jax.eval_shape(lambda: population.select(state, 0))
    total, trained = parameter_count(shapes.eval_shapes()), parameter_count(shapes.params)
    arch, dtype = c.model.arch, c.train.dtype
    if count == 1:
        devices = f"{setup.parts.mesh.size} {kind} device{'s' * (setup.parts.mesh.size > 1)}"
        console.say(f"model      {arch}, {total:,} parameters, {dtype}, on {devices}")
    else:
        size = sharding.member_sharding(count).mesh.size
        console.say(f"members    {count} of {arch}, {total:,} parameters each, {dtype}, on {size} {kind}")
        differing = ", ".join([*population.members.values] + ["data.seed"] * (not population.shared))
        console.say(f"differ in  {differing or 'nothing'}")
    if state.frozen:
        console.say(f"finetune   {c.finetune.method}: {trained:,} parameters train, {trained / total:.2%}")
    packed = c.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(setup.parts.model.config, dtype, packed)}")
    if metrics.peak_flops(kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")


def member_values(population: Population) -> Values:
    """The differing hyperparameters at the step to resume from, [N] each, on the devices; {} of a single run."""
    if population.size == 1:
        return {}
    folders, values = [setup.workdir for setup in population.setups], population.members.values
    if population.evolution:
        values = evolutions.values_at(population.first.resumes_at, folders, values)
    return jax.device_put(values, sharding.member_sharding(population.size))


def load_batch(population: Population, index: int) -> dict[str, jax.Array]:
    """Loads the batch of step `index` + 1 on the devices: one shared by all members, or one each, [N, ...]."""
    setup, count = population.first, population.size
    if count == 1:
        parts, train = setup.parts, setup.batches.train
        return parts.teacher_fn(sharding.place_batch(train[index], parts.mesh, *train.share))
    if population.shared:
        return dict(jax.device_put(dict(setup.batches.train[index]), sharding.shared_sharding(count)))
    each = batches.stack([setup.batches.train[index] for setup in population.setups])
    return dict(jax.device_put(dict(each), sharding.member_sharding(count)))


def load_next_batch(population: Population, index: int) -> dict[str, jax.Array] | None:
    """Loads the batch like `load_batch`; returns None if a single run leaves it out."""
    is_left_out = population.size == 1 and recovery.is_left_out(population.first, index + 1)
    return None if is_left_out else load_batch(population, index)


def batch_shape(population: Population, batch: dict[str, jax.Array]) -> tuple[int, int]:
    """Returns [B, T] of one member's inputs; an objective may make T shorter than data.context."""
    shape = batch["inputs_BT"].shape[0 if population.shared else 1 :]
    return shape[0], shape[-1]


def compile_steps(population: Population, values: Values, state: TrainState) -> dict[tuple[int, int], PopulationStep]:
    """Compiles the train step for each remaining shape [B, T], so that no step time includes compilation."""
    setup, step_fn = population.first, jit_step_of(population, state)
    taken, stages = int(np.max(state.step)), setup.batches.stages
    compiled: dict[tuple[int, int], PopulationStep] = {}
    for stage in stages[stages.index(batches.stage_of(taken + 1, stages)) :]:
        index = max(stage.start, taken)
        batch = load_batch(population, index)
        shape, start = batch_shape(population, batch), time.monotonic()
        if shape in compiled:
            continue
        compiled[shape] = step_fn.lower(*step_arguments(population, values, state, batch, index + 1)).compile()
        suffix = f" for {shape[0]} x {shape[1]} tokens" if len(stages) > 1 else ""
        console.say(f"compiled   in {time.monotonic() - start:.1f} s{suffix}")
    return compiled


def jit_step_of(population: Population, state: TrainState) -> jax.stages.Wrapped:
    """Jits the step of a single run, `(state, batch) -> (state, metrics)`, or that of several members.

    The latter also takes their values, before the state, and after the batch whether each leaves it out, if any does.
    """
    setup, count = population.first, population.size
    c, parts = setup.config, setup.parts
    if count == 1:
        return make_train_step(c, parts.objective, parts.optimizer, parts.mesh, state)
    axes = (0, 0, None if population.shared else 0) + (0,) * leaves_batches_out(population)
    all_members = jax.vmap(partial(members.member_step, c, parts.mesh), in_axes=axes)
    sharded = sharding.shard_members(all_members, count, (2,) if population.shared else ())
    return jax.jit(sharded, donate_argnums=1, compiler_options=kernels.compiler_options(c.model, c.train.dtype) or None)


def step_arguments(population: Population, values: Values, state: TrainState, batch: Any, step: int) -> tuple[Any, ...]:
    """Returns the arguments of the function that `jit_step_of` returns, for a step."""
    if population.size == 1:
        return state, batch
    if not leaves_batches_out(population):
        return values, state, batch
    left_out_N = np.array([recovery.is_left_out(setup, step) for setup in population.setups])
    return values, state, batch, jax.device_put(left_out_N, sharding.member_sharding(population.size))


def leaves_batches_out(population: Population) -> bool:
    """Returns True if any member leaves out the batches of some steps."""
    return any(setup.left_out for setup in population.setups)


def take_step(
    population: Population,
    step_fns: dict[tuple[int, int], PopulationStep],
    values: Values,
    state: TrainState,
    step: int,
    batch: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step of all members; returns the new state and the metrics. A batch of None leaves the step out."""
    if batch is None:
        return recovery.skip_batch(state)
    if recovery.changes_batches(population.first, step):
        state = recovery.on_scalars(population.map(recovery.without_statistics), state)
    step_fn = step_fns[batch_shape(population, batch)]
    return step_fn(*step_arguments(population, values, state, batch, step))


def make_eval_step(setup: TrainSetup, count: int) -> held_out.EvalStep:
    """Compiles `(parameters of all members, batch) -> metrics`, [N] each; see gptjax.evals.held_out.eval_step."""
    c = setup.config
    evaluate = sharding.shard_members(
        jax.vmap(lambda p, b: setup.parts.objective(p, b, None)[1], in_axes=(0, None)), count, (1,)
    )
    return jax.jit(evaluate, compiler_options=kernels.compiler_options(c.model, c.train.dtype) or None)


def evaluate_members(
    setup: TrainSetup,
    eval_step: held_out.EvalStep,
    count: int,
    params: Any,
    eval_batches: Iterable[Any],
    advance: Callable[..., None],
) -> list[dict[str, float]]:
    """Evaluates several members on batches of held-out text with one program; see gptjax.evals.held_out.evaluate.

    Args:
      setup: of the first member.
      eval_step: from `make_eval_step`.
      count: number of members, N.
      params: of all members, [N, ...].
      eval_batches: of the held-out text.
      advance: called after each batch.
    """
    there, every_batch, outputs = sharding.shared_sharding(count), list(eval_batches), []
    for batch in every_batch:
        outputs.append(jax.device_get(eval_step(params, jax.device_put(dict(batch), there))))
        advance()

    def quality(m: int) -> dict[str, float]:
        of_member = iter(jax.tree.map(lambda output_N: output_N[m], outputs))
        parts = setup.parts._replace(eval_step=lambda params, batch: next(of_member))
        return setup._replace(parts=parts).evaluate(None, every_batch)

    return [quality(m) for m in range(count)]


def evolve(
    population: Population, step: int, values: Values, state: TrainState, quality: Sequence[dict[str, float]]
) -> tuple[Values, TrainState, dict[int, tuple[int, ConfigDict]]]:
    """Selects members by held-out loss, and records each replacement in its directory.

    Args:
      population: that evolves.
      step: just taken.
      values, state: of all members; the buffers of the state are donated.
      quality: metrics of each member on held-out text.

    Returns:
      The new values and state, and of each member that was replaced: the one whose state it got, and its new config.
    """
    assert population.evolution
    setup, there = population.first, sharding.member_sharding(population.size)
    key = rng.key(setup.config.seed, "evolution", step)
    select = partial(evolutions.exploit_and_explore, population.evolution)
    select_members = jax.jit(select, donate_argnums=(2, 3), out_shardings=None)
    losses_N = jax.device_put(np.array([member["loss"] for member in quality], np.float32), there)
    values, state, source_N = select_members(key, losses_N, values, state)
    values, state = jax.device_put((values, state), there)
    new_values, replaced = jax.device_get(values), {}
    for m, source in enumerate(np.asarray(source_N).tolist()):
        if m != source:
            member, parent = population.setups[m], population.setups[source].workdir.name
            of_member = population.select(new_values, m)
            evolutions.write(member.workdir, step, parent, of_member)
            replaced[m] = source, members.with_values(member.config, of_member)
            console.say(f"evolved    {member.workdir.name} continues from the state of {parent} after step {step:,}")
    return values, state, replaced
