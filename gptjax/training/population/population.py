"""Trains a population: runs that differ only in numbers, as one compiled program.

Members read one stream of batches, or one each where their data seeds differ. Each member leaves an ordinary run
directory, as if it had been trained alone. gptjax.training.population.members decides which keys may differ, and
gptjax.sharding places the members on devices. A member that diverges keeps its last good state
(gptjax.optim.skip_step), and the others continue.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gptjax import models, sharding
from gptjax.config.errors import ConfigError, Interrupted
from gptjax.core import console, cpu_idle, rng
from gptjax.data import batches
from gptjax.evals import held_out
from gptjax.models import kernels
from gptjax.runs import checkpoint_dir, integrity
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoint_policy import SaveSchedule
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.training import loop, memory
from gptjax.training.monitoring import goodput, interrupts, metrics, report, watchdog
from gptjax.training.population import evolution as evolutions
from gptjax.training.population import members
from gptjax.training.population.evolution import Evolution
from gptjax.training.population.members import Members, Values
from gptjax.training.recorders import OnMemberLine, Recorders, select_member
from gptjax.training.setup import TrainSetup, batch_seed, train_setup


class Population(NamedTuple):
    """The parts of a population that do not change while its members train."""

    members: Members
    setups: list[TrainSetup]
    shared: bool  # all members read the same batches
    eval_step: held_out.EvalStep  # of all members' parameters
    evolution: Evolution | None

    @property
    def first(self) -> TrainSetup:
        """The set-up whose data, model shapes and settings all members share."""
        return self.setups[0]


def train(
    all_configs: Sequence[ConfigDict],
    all_workdirs: Sequence[Path],
    on_line: OnMemberLine = lambda member, line: None,
    started: float | None = None,
    evolution: Evolution | None = None,
) -> list[dict[str, Any] | None]:
    """Trains the runs of these configs in their directories, or resumes them; returns their summaries.

    Args:
      all_configs: from gptjax.config.read; they may differ only in keys of `members.TRACED` and in data.seed.
      all_workdirs: one directory per config; absent, empty, or a run of the same config.
      on_line: called with the member's number and each line of its metrics.jsonl.
      started: time.monotonic() at the start of the process, so that its imports are counted; default: now.
      evolution: population-based training; None: members train independently.

    Returns:
      The summary of each member, as returned by gptjax.training.loop.train; None for a member that diverged.

    Raises:
      ConfigError, DataError, CheckpointError: user errors; nothing is written.
      Interrupted: by a signal; the current step is saved.
    """
    started = time.monotonic() if started is None else started
    resolved = [
        loop.resolve_config(config, where, None) for config, where in zip(all_configs, all_workdirs, strict=True)
    ]
    check(resolved, all_configs, evolution)
    for config, where in zip(resolved, all_workdirs, strict=True):
        workdirs.check_free(where, config)
    done = [report.read_summary(where) for where in all_workdirs]
    if all(done):
        return list(done)
    with ExitStack() as stack:
        population = build_population(resolved, all_workdirs, started, evolution)
        clock = population.first.clock
        for setup in population.setups:
            stack.enter_context(workdirs.lock(setup.workdir))
        written = [stack.enter_context(loop.open_checkpoints(setup)) for setup in population.setups]
        try:
            states = init_or_restore_states(population, written)
            step = population.first.resumes_at
            for setup in population.setups:
                stack.enter_context(goodput.record_clock(clock, setup.workdir, step))
            with interrupts.handle_signals() as stop_signal:
                states, alive = train_steps(population, states, written, on_line, stop_signal)
            with clock.during("finish"), cpu_idle.keep_awake(jax.default_backend() == "cpu"):
                return finish(population, states, alive, done)
        except KeyboardInterrupt as error:
            for checkpoints in written:
                checkpoints.wait()
            there = "saved; the same command resumes training" if written[0].latest() else "nothing is saved yet"
            raise Interrupted.after(error, f"interrupted; {there}") from None


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
    step = common_step([setup.workdir for setup in setups])
    setups = [setup._replace(clock=first.clock, eval_step=first.eval_step, resumes_at=step) for setup in setups]
    shared = len({batch_seed(setup.config) for setup in setups}) == 1
    traced = members.from_configs([setup.config for setup in setups])
    return Population(traced, setups, shared, make_eval_step(first, len(setups)), evolution)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """Returns the config with a single-device mesh, as each member has."""
    return members.with_values(config, {"mesh.data": 1})


def common_step(all_workdirs: Sequence[Path]) -> int:
    """Newest step of which every member has an undamaged checkpoint; 0 if there is none."""
    there = [set(checkpoint_dir.steps(where / "checkpoints")) for where in all_workdirs]
    for step in sorted(set.intersection(*there), reverse=True):
        if all(is_intact(where / "checkpoints", step) for where in all_workdirs):
            return step
    return 0


def is_intact(directory: Path, step: int) -> bool:
    """Returns True if the files of a checkpoint match their digests."""
    return not integrity.problem(directory / str(step), "", checkpoint_dir.CHANGING)


def make_eval_step(setup: TrainSetup, count: int) -> held_out.EvalStep:
    """Compiles `(parameters of all members, batch) -> metrics`, [M] each; see gptjax.evals.held_out.eval_step."""
    c = setup.config
    evaluate = sharding.shard_members(
        jax.vmap(lambda p, b: setup.objective(p, b, None)[1], in_axes=(0, None)), count, (1,)
    )
    return jax.jit(evaluate, compiler_options=kernels.compiler_options(c.model, c.train.dtype) or None)


def init_or_restore_states(population: Population, written: Sequence[Checkpoints]) -> TrainState:
    """Restores or initializes the states of all members, [M, ...] on the devices."""
    setup, count = population.first, len(population.setups)
    there = sharding.member_sharding(count)
    if setup.resumes_at:
        shapes = shapes_on(jax.eval_shape(loop.init_fn(setup)), sharding.replicated(setup.mesh))
        restored = [checkpoints.restore(shapes, setup.resumes_at) for checkpoints in written]
        states = jax.device_put(jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *restored), there)
        console.say(f"resuming   {count} members at step {setup.resumes_at:,} of {setup.config.train.steps:,}")
    else:
        make = jax.vmap(partial(members.init_member_state, setup.config), axis_size=count)
        states = jax.jit(make, out_shardings=there)(member_values(population))
    for checkpoints in written:
        checkpoints.delete_after(setup.resumes_at)  # a step that other members may not have
    of_one = parameter_count(states.params) // count
    arch, dtype, kind = setup.config.model.arch, setup.config.train.dtype, jax.devices()[0].device_kind
    console.say(f"members    {count} of {arch}, {of_one:,} parameters each, {dtype}, on {there.mesh.size} {kind}")
    differing = ", ".join([*population.members.values] + ["data.seed"] * (not population.shared))
    console.say(f"differ in  {differing or 'nothing'}")
    packed = setup.config.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(setup.model.config, dtype, packed)}")
    if metrics.peak_flops(kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")
    return states


def member_values(population: Population) -> Values:
    """The differing hyperparameters at the step to resume from, [M] each, on the devices."""
    folders, values = [setup.workdir for setup in population.setups], population.members.values
    if population.evolution:
        values = evolutions.values_at(population.first.resumes_at, folders, values)
    return jax.device_put(values, sharding.member_sharding(len(population.setups)))


def compile_steps(population: Population, values: Values, states: TrainState) -> dict[tuple[int, int], Any]:
    """Compiles the step of all members, `(values, states, batch) -> (states, metrics)`, for each [B, T] of a batch."""
    setup, count = population.first, len(population.setups)
    of_batch = None if population.shared else 0
    all_members = jax.vmap(partial(members.member_step, setup.config, setup.mesh), in_axes=(0, 0, of_batch))
    shared = (2,) if population.shared else ()
    options = kernels.compiler_options(setup.config.model, setup.config.train.dtype)
    step = jax.jit(
        sharding.shard_members(all_members, count, shared), donate_argnums=1, compiler_options=options or None
    )
    current, start = batches.stage_of(int(setup.resumes_at) + 1, setup.stages), time.monotonic()
    compiled: dict[tuple[int, int], Any] = {}
    for stage in setup.stages[setup.stages.index(current) :]:
        batch = load_batch(population, max(stage.start, setup.resumes_at))
        shape = batch_shape(batch)
        if shape not in compiled:
            compiled[shape] = step.lower(values, states, batch).compile()
    console.say(f"compiled   in {time.monotonic() - start:.1f} s")
    return compiled


def batch_shape(batch: dict[str, jax.Array]) -> tuple[int, int]:
    """Returns [B, T] of the inputs of one member."""
    B, T = batch["inputs_BT"].shape[-2:]
    return B, T


def load_batch(population: Population, index: int) -> dict[str, jax.Array]:
    """Loads the batch of step `index` + 1 on the devices: one shared by all members, or one each, [M, ...]."""
    if population.shared:
        batch, there = population.first.train_batches[index], sharding.shared_sharding(len(population.setups))
    else:
        batch = batches.stack([setup.train_batches[index] for setup in population.setups])
        there = sharding.member_sharding(len(population.setups))
    return dict(jax.device_put(dict(batch), there))


def train_steps(
    population: Population,
    states: TrainState,
    written: Sequence[Checkpoints],
    on_line: OnMemberLine,
    stop_signal: interrupts.StopSignal,
) -> tuple[TrainState, list[bool]]:
    """Takes every remaining step; returns the states, and which members have not diverged."""
    setup = population.first
    c, clock, start, steps = setup.config, setup.clock, setup.resumes_at, setup.config.train.steps
    if start == steps:
        return states, [True] * len(population.setups)
    values = member_values(population)
    with clock.during("compile"):
        compiled = compile_steps(population, values, states)
    sample = [setup.eval_batches[i] for i in batches.evenly_spaced(setup.eval_batches, c.eval.batches)]
    due = SaveSchedule(c.checkpoint, steps)
    with (
        cpu_idle.keep_awake(jax.default_backend() == "cpu"),
        batches.prefetch(partial(load_batch, population), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorders(population.setups, states, advance, on_line) as recorders,
        watchdog.watch_progress(c.train.hang_minutes, setup.workdir / "hang.txt", lambda: clock.kind) as beat,
        clock.during("step"),
    ):
        for step in range(start + 1, steps + 1):
            with clock.during("data"):
                batch = next(coming)
            states, step_metrics = compiled[batch_shape(batch)](values, states, batch)
            recorders.write(recorders.take())
            recorders.push(step, step_metrics)
            beat()
            evolves, saves = should_select(population.evolution, step, steps), due(step)
            evaluates = evolves or step % c.eval.every_steps == 0 or step == steps
            quality: list[dict[str, float]] = []
            if evaluates or saves:
                lines = recorders.take(due=evaluates)
                if evaluates:
                    with clock.during("eval"):
                        quality = evaluate_members(population, states, lambda: sample, beat)
                recorders.write(lines, list(map(loop.validation_metrics, quality)) or None)
                if evolves:
                    values, states = select(population, step, values, states, recorders, quality)
                if saves:
                    save(population, step, states, written, recorders.alive, quality)
                    due.restart()
            if not any(recorders.alive):
                break
            if number := stop_signal(step):
                recorders.write(recorders.take(due=True))
                if not saves:
                    save(population, step, states, written, recorders.alive)
                raise Interrupted(number)
        with clock.during("save"):
            for m in alive_members(recorders.alive):
                written[m].finish(select_member(states, m))
    return states, recorders.alive


def should_select(evolution: Evolution | None, step: int, steps: int) -> bool:
    """Returns True if members are selected after `step`."""
    return evolution is not None and step % evolution.every_steps == 0 and step < steps


def select(
    population: Population,
    step: int,
    values: Values,
    states: TrainState,
    recorders: Recorders,
    quality: Sequence[dict[str, float]],
) -> tuple[Values, TrainState]:
    """Selects members by held-out loss; returns values and states, and records each replacement in its directory."""
    assert population.evolution
    setup, there = population.first, sharding.member_sharding(len(population.setups))
    key = rng.key(setup.config.seed, "evolution", step)
    evolve = partial(evolutions.exploit_and_explore, population.evolution)
    select_members = jax.jit(evolve, donate_argnums=(2, 3), out_shardings=None)
    losses_M = jax.device_put(np.array([member["loss"] for member in quality], np.float32), there)
    values, states, source_M = select_members(key, losses_M, values, states)
    values, states = jax.device_put((values, states), there)
    new_values = jax.device_get(values)
    for m, source in enumerate(np.asarray(source_M).tolist()):
        if m != source:
            replaced, parent = population.setups[m], population.setups[source].workdir.name
            evolutions.write(replaced.workdir, step, parent, select_member(new_values, m))
            recorders.inherit(m, members.with_values(replaced.config, select_member(new_values, m)), source)
            console.say(f"evolved    {replaced.workdir.name} continues from the state of {parent} after step {step:,}")
    return values, states


def alive_members(alive: Sequence[bool]) -> list[int]:
    """The numbers of the members that have not diverged."""
    return [m for m, is_alive in enumerate(alive) if is_alive]


def save(
    population: Population,
    step: int,
    states: TrainState,
    written: Sequence[Checkpoints],
    alive: Sequence[bool],
    quality: Sequence[dict[str, float]] = (),
) -> None:
    """Starts to write a checkpoint of each member, with its held-out loss if it is known.

    A diverged member is saved as well: all members have to resume from the same step.
    """
    setup = population.first
    with setup.clock.during("save"):
        for m in range(len(alive)):
            written[m].save(step, select_member(states, m), quality[m]["loss"] if quality else None)
    setup.clock.mark(step)


def evaluate_members(
    population: Population,
    states: TrainState,
    make_batches: Callable[[], Iterable[Any]],
    advance: Callable[..., None],
) -> list[dict[str, float]]:
    """Evaluates all members on batches of held-out text with one program; see gptjax.evals.held_out.evaluate."""
    setup = population.first
    params = jax.vmap(TrainState.eval_params)(states)
    there = sharding.shared_sharding(len(population.setups))
    outputs = []
    for batch in make_batches():
        outputs.append(jax.device_get(population.eval_step(params, jax.device_put(dict(batch), there))))
        advance()

    def quality(m: int) -> dict[str, float]:
        metrics_of_batches = iter(select_member(outputs, m))
        return setup._replace(eval_step=lambda params, batch: next(metrics_of_batches)).evaluate(None, make_batches())

    return [quality(m) for m in range(len(population.setups))]


def finish(
    population: Population, states: TrainState, alive: Sequence[bool], done: Sequence[dict[str, Any] | None]
) -> list[dict[str, Any] | None]:
    """Evaluates on all held-out text; writes samples, plot and summary of each member that has not diverged."""
    setup = population.first
    held_out_batches = [setup.eval_batches[i] for i in range(len(setup.eval_batches))]
    with console.bar("reading all held-out text", len(held_out_batches)) as advance:
        quality = evaluate_members(population, states, lambda: held_out_batches, advance)
    with console.bar("writing samples and plots", len(alive)) as advance:
        summaries = list(done)
        for m in alive_members(alive):
            if not done[m] and math.isfinite(quality[m]["loss"]):
                params = select_member(states, m).eval_params()
                summaries[m] = loop.write_results(population.setups[m], params, quality[m])
            advance()
    return summaries
