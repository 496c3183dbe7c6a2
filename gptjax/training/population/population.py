"""A population: runs that differ in numbers alone, trained as one compiled program on one stream of batches, or each on
its own. Each member leaves an ordinary run directory, as if it had been trained alone.

What may differ is gptjax.training.population.members' part; how the members lie on devices gptjax.sharding's. A member
whose steps go bad for good stays as it is from then on (gptjax.optim.skip_step), and the others go on.
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
from gptjax.training.recorders import OnMembersLine, Recorders, of_member
from gptjax.training.setup import TrainSetup, make_job, order_seed


class Population(NamedTuple):
    """All that stays the same while its members train."""

    members: Members
    jobs: list[TrainSetup]
    shared: bool  # whether all members read the same batches
    look: held_out.EvalStep  # at all members' parameters
    evolution: Evolution | None

    @property
    def first(self) -> TrainSetup:
        """Of the job whose data, model's shapes and settings all members have."""
        return self.jobs[0]


def train(
    all_configs: Sequence[ConfigDict],
    all_workdirs: Sequence[Path],
    on_line: OnMembersLine = lambda member, line: None,
    started: float | None = None,
    evolution: Evolution | None = None,
) -> list[dict[str, Any] | None]:
    """Trains the runs of these configs in their directories, or goes on with them; returns their summaries.

    Args:
      all_configs: as gptjax.config.read gives them; they differ in keys of `members.TRACED` and in data.seed alone.
      all_workdirs: one each; absent, empty, or that config's own.
      on_line: gets each line of each member's metrics.jsonl, after the member's number.
      started: time.monotonic() at the start of the process, where its imports are to count; default: now.
      evolution: how members take each other's places and vary their values on the way; None: they do not.

    Returns:
      a summary of each member, as gptjax.training.loop.train gives it; None for one that diverged.

    Raises:
      ConfigError, DataError, CheckpointError: what the user can mend; nothing is written then.
      Interrupted: by a signal; the step in hand is saved.
    """
    started = time.monotonic() if started is None else started
    resolved = [loop.resolved(config, where, None) for config, where in zip(all_configs, all_workdirs, strict=True)]
    check(resolved, all_configs, evolution)
    for config, where in zip(resolved, all_workdirs, strict=True):
        workdirs.check_free(where, config)
    done = [report.read_summary(where) for where in all_workdirs]
    if all(done):
        return list(done)
    with ExitStack() as stack:
        population = made(resolved, all_workdirs, started, evolution)
        clock = population.first.clock
        for job in population.jobs:
            stack.enter_context(workdirs.lock(job.workdir))
        written = [stack.enter_context(loop.open_checkpoints(job)) for job in population.jobs]
        try:
            states = begin(population, written)
            step = population.first.resumes_at
            for job in population.jobs:
                stack.enter_context(goodput.kept(clock, job.workdir, step))
            with interrupts.noted() as asked:
                states, alive = take_steps(population, states, written, on_line, asked)
            with clock.during("finish"), cpu_idle.keep_awake(jax.default_backend() == "cpu"):
                return finish(population, states, alive, done)
        except KeyboardInterrupt as error:
            for checkpoints in written:
                checkpoints.wait()
            there = "saved; the same command goes on there" if written[0].latest() else "nothing is saved yet"
            raise Interrupted.after(error, f"interrupted; {there}") from None


def check(resolved: Sequence[ConfigDict], asked: Sequence[ConfigDict] = (), evolution: Evolution | None = None) -> None:
    """Raises ConfigError for what one program of several members cannot do."""
    found = members.of(resolved, asked)
    memory.check_config(resolved[0], len(resolved))
    if evolution:
        evolutions.check(evolution, found.values, len(resolved))
    c = resolved[0]
    if c.init_from:
        raise ConfigError("a population begins with random parameters; leave init_from or --vmap out")
    if jax.process_count() > 1:
        raise ConfigError("a population trains in one process; leave --vmap out, or share a study between processes")
    if c.objective.teacher:
        raise ConfigError("a population has no teacher; leave objective.teacher or --vmap out")
    if math.prod(size for size in c.mesh.values() if size > 0) > 1:
        raise ConfigError("members of a population lie on one device each; leave config.mesh or --vmap out")


def made(
    resolved: Sequence[ConfigDict], all_workdirs: Sequence[Path], started: float, evolution: Evolution | None
) -> Population:
    """The jobs of all members, which share one reading of the data, and go on from one step."""
    first = make_job(on_one_device(resolved[0]), all_workdirs[0], started, members=len(resolved))
    others = [
        make_job(on_one_device(config), where, started, loaded=first.data)
        for config, where in zip(resolved[1:], all_workdirs[1:], strict=True)
    ]
    jobs = [first, *others]
    step = common_step([job.workdir for job in jobs])
    jobs = [job._replace(clock=first.clock, eval_step=first.eval_step, resumes_at=step) for job in jobs]
    shared = len({order_seed(job.config) for job in jobs}) == 1
    return Population(members.of([job.config for job in jobs]), jobs, shared, looking(first, len(jobs)), evolution)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """The config of a run on a single device, as each member's is."""
    return members.with_values(config, {"mesh.data": 1})


def common_step(all_workdirs: Sequence[Path]) -> int:
    """The newest step of which all members have a whole checkpoint; 0 where there is none."""
    there = [set(checkpoint_dir.steps(where / "checkpoints")) for where in all_workdirs]
    for step in sorted(set.intersection(*there), reverse=True):
        if all(is_whole(where / "checkpoints", step) for where in all_workdirs):
            return step
    return 0


def is_whole(directory: Path, step: int) -> bool:
    """Whether a checkpoint's files are as they were written."""
    return not integrity.problem(directory / str(step), "", checkpoint_dir.CHANGING)


def looking(job: TrainSetup, count: int) -> held_out.EvalStep:
    """Compiled `(all members' parameters, batch) -> metrics`, [M] each; see gptjax.evals.held_out.eval_step."""
    c = job.config
    look = sharding.over_members(jax.vmap(lambda p, b: job.objective(p, b, None)[1], in_axes=(0, None)), count, (1,))
    return jax.jit(look, compiler_options=kernels.compiler_options(c.model, c.train.dtype) or None)


def begin(population: Population, written: Sequence[Checkpoints]) -> TrainState:
    """The states that the members go on from, or their first ones, [M, ...] on the devices."""
    job, count = population.first, len(population.jobs)
    there = sharding.of_members(count)
    if job.resumes_at:
        shapes = shapes_on(jax.eval_shape(loop.start_of(job)), sharding.replicated(job.mesh))
        found = [checkpoints.restore(shapes, job.resumes_at) for checkpoints in written]
        states = jax.device_put(jax.tree.map(lambda *leaves: np.stack(jax.device_get(leaves)), *found), there)
        console.say(f"resuming   {count} members at step {job.resumes_at:,} of {job.config.train.steps:,}")
    else:
        make = jax.vmap(partial(members.state_of, job.config), axis_size=count)
        states = jax.jit(make, out_shardings=there)(values_of(population))
    for checkpoints in written:
        checkpoints.drop_after(job.resumes_at)  # of which others have none
    of_one = parameter_count(states.params) // count
    arch, dtype, kind = job.config.model.arch, job.config.train.dtype, jax.devices()[0].device_kind
    console.say(f"members    {count} of {arch}, {of_one:,} parameters each, {dtype}, on {there.mesh.size} {kind}")
    said = ", ".join([*population.members.values] + ["data.seed"] * (not population.shared))
    console.say(f"differ in  {said or 'nothing'}")
    packed = job.config.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(job.model.config, dtype, packed)}")
    if metrics.peak_flops(kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")
    return states


def values_of(population: Population) -> Values:
    """What differs, on the devices, as it is at the step at which the members go on."""
    where, own = [job.workdir for job in population.jobs], population.members.values
    now = evolutions.values_at(population.first.resumes_at, where, own) if population.evolution else own
    return jax.device_put(now, sharding.of_members(len(population.jobs)))


def compiled_steps(population: Population, values: Values, states: TrainState) -> dict[tuple[int, int], Any]:
    """The step of all members by [B, T] of a batch, `(values, states, batch) -> (states, metrics)`, compiled."""
    job, count = population.first, len(population.jobs)
    of_batch = None if population.shared else 0
    every = jax.vmap(partial(members.step_of, job.config, job.mesh), in_axes=(0, 0, of_batch))
    shared = (2,) if population.shared else ()
    options = kernels.compiler_options(job.config.model, job.config.train.dtype)
    step = jax.jit(sharding.over_members(every, count, shared), donate_argnums=1, compiler_options=options or None)
    now, begins = batches.stage_of(int(job.resumes_at) + 1, job.stages), time.monotonic()
    compiled: dict[tuple[int, int], Any] = {}
    for stage in job.stages[job.stages.index(now) :]:
        batch = placed(population, max(stage.start, job.resumes_at))
        shape = shape_of(batch)
        if shape not in compiled:
            compiled[shape] = step.lower(values, states, batch).compile()
    console.say(f"compiled   in {time.monotonic() - begins:.1f} s")
    return compiled


def shape_of(batch: dict[str, jax.Array]) -> tuple[int, int]:
    """[B, T] of what a member's model reads."""
    B, T = batch["inputs_BT"].shape[-2:]
    return B, T


def placed(population: Population, index: int) -> dict[str, jax.Array]:
    """The batch of step `index` + 1 on the devices, one for all members or one each, [M, ...]."""
    if population.shared:
        batch, there = population.first.train_batches[index], sharding.of_all_members(len(population.jobs))
    else:
        batch = batches.stack([job.train_batches[index] for job in population.jobs])
        there = sharding.of_members(len(population.jobs))
    return dict(jax.device_put(dict(batch), there))


def take_steps(
    population: Population,
    states: TrainState,
    written: Sequence[Checkpoints],
    on_line: OnMembersLine,
    asked: interrupts.Asked,
) -> tuple[TrainState, list[bool]]:
    """Every step from the states' to the last, and which members are alive then."""
    job = population.first
    c, clock, start, steps = job.config, job.clock, job.resumes_at, job.config.train.steps
    if start == steps:
        return states, [True] * len(population.jobs)
    values = values_of(population)
    with clock.during("compile"):
        compiled = compiled_steps(population, values, states)
    sample = [job.eval_batches[i] for i in batches.evenly_spaced(job.eval_batches, c.eval.batches)]
    due = SaveSchedule(c.checkpoint, steps)
    with (
        cpu_idle.keep_awake(jax.default_backend() == "cpu"),
        batches.prefetch(partial(placed, population), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorders(population.jobs, states, advance, on_line) as recorders,
        watchdog.watched(c.train.hang_minutes, job.workdir / "hang.txt", lambda: clock.kind) as beat,
        clock.during("step"),
    ):
        for step in range(start + 1, steps + 1):
            with clock.during("data"):
                batch = next(coming)
            states, said = compiled[shape_of(batch)](values, states, batch)
            recorders.write(recorders.take())
            recorders.push(step, said)
            beat()
            evolves, saves = is_selected(population.evolution, step, steps), due(step)
            evaluates = evolves or step % c.eval.every_steps == 0 or step == steps
            found: list[dict[str, float]] = []
            if evaluates or saves:
                lines = recorders.take(due=evaluates)
                if evaluates:
                    with clock.during("eval"):
                        found = qualities(population, states, lambda: sample, beat)
                recorders.write(lines, list(map(loop.shown, found)) or None)
                if evolves:
                    values, states = select(population, step, values, states, recorders, found)
                if saves:
                    save(population, step, states, written, recorders.alive, found)
                    due.restart()
            if not any(recorders.alive):
                break
            if number := asked(step):
                recorders.write(recorders.take(due=True))
                if not saves:
                    save(population, step, states, written, recorders.alive)
                raise Interrupted(number)
        with clock.during("save"):
            for m in alive_ones(recorders.alive):
                written[m].finish(of_member(states, m))
    return states, recorders.alive


def is_selected(evolution: Evolution | None, step: int, steps: int) -> bool:
    """Whether there is a selection after a step."""
    return evolution is not None and step % evolution.every_steps == 0 and step < steps


def select(
    population: Population,
    step: int,
    values: Values,
    states: TrainState,
    recorders: Recorders,
    found: Sequence[dict[str, float]],
) -> tuple[Values, TrainState]:
    """Values and states after a selection by held-out loss, which is noted in each replaced member's directory."""
    assert population.evolution
    job, there = population.first, sharding.of_members(len(population.jobs))
    key = rng.key(job.config.seed, "evolution", step)
    choose = jax.jit(partial(evolutions.evolved, population.evolution), donate_argnums=(2, 3), out_shardings=None)
    losses_M = jax.device_put(np.array([own["loss"] for own in found], np.float32), there)
    values, states, source_M = choose(key, losses_M, values, states)
    values, states = jax.device_put((values, states), there)
    now = jax.device_get(values)
    for m, source in enumerate(np.asarray(source_M).tolist()):
        if m != source:
            own, parent = population.jobs[m], population.jobs[source].workdir.name
            evolutions.write(own.workdir, step, parent, of_member(now, m))
            recorders.goes_on_with(m, members.with_values(own.config, of_member(now, m)), source)
            console.say(f"evolved    {own.workdir.name} goes on with {parent}'s state after step {step:,}")
    return values, states


def alive_ones(alive: Sequence[bool]) -> list[int]:
    """The numbers of the members that still learn."""
    return [m for m, own in enumerate(alive) if own]


def save(
    population: Population,
    step: int,
    states: TrainState,
    written: Sequence[Checkpoints],
    alive: Sequence[bool],
    found: Sequence[dict[str, float]] = (),
) -> None:
    """Begins to write a checkpoint of each member, of its held-out loss where that is known.

    Those that diverged have none from then on: the others could not go on from a step that is not theirs.
    """
    job = population.first
    with job.clock.during("save"):
        for m in range(len(alive)):
            written[m].save(step, of_member(states, m), found[m]["loss"] if found else None)
    job.clock.mark(step)


def qualities(
    population: Population,
    states: TrainState,
    some: Callable[[], Iterable[Any]],
    advance: Callable[..., None],
) -> list[dict[str, float]]:
    """How well each member does batches of held-out text, all looked at by one program; see held_out.quality_of."""
    job = population.first
    params = jax.vmap(TrainState.eval_params)(states)
    there = sharding.of_all_members(len(population.jobs))
    said = []
    for batch in some():
        said.append(jax.device_get(population.look(params, jax.device_put(dict(batch), there))))
        advance()

    def of(m: int) -> dict[str, float]:
        own = iter(of_member(said, m))
        return job._replace(eval_step=lambda params, batch: next(own)).held_out_quality(None, some())

    return [of(m) for m in range(len(population.jobs))]


def finish(
    population: Population, states: TrainState, alive: Sequence[bool], done: Sequence[dict[str, Any] | None]
) -> list[dict[str, Any] | None]:
    """Reads all held-out text, and writes samples, plot and summary of each member that is alive."""
    job = population.first
    every = [job.eval_batches[i] for i in range(len(job.eval_batches))]
    with console.bar("reading all held-out text", len(every)) as advance:
        found = qualities(population, states, lambda: every, advance)
    with console.bar("writing samples and plots", len(alive)) as advance:
        summaries = list(done)
        for m in alive_ones(alive):
            if not done[m] and math.isfinite(found[m]["loss"]):
                summaries[m] = loop.written(population.jobs[m], of_member(states, m).eval_params(), found[m])
            advance()
    return summaries
