"""The training loop, from config to summary, of a run or of a population of runs; a run is a population of one.

All outputs go to the runs' directories. Messages go to the console; nothing is printed to stdout.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gptjax.config.errors import Diverged, Interrupted
from gptjax.core import console, cpu_idle
from gptjax.data import batches
from gptjax.evals import held_out
from gptjax.interop import foreign
from gptjax.runs import directory as workdirs
from gptjax.runs import pretrained
from gptjax.runs.checkpoint_policy import SaveSchedule
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import TrainState
from gptjax.runs.writers import Line
from gptjax.sharding import processes
from gptjax.training import recovery
from gptjax.training import setup as setups
from gptjax.training.hooks import Hook, StepInfo, run_hooks
from gptjax.training.monitoring import goodput, interrupts, profiler, report, watchdog
from gptjax.training.population import population as populations
from gptjax.training.population.evolution import Evolution
from gptjax.training.population.population import Population
from gptjax.training.recorder import OnLine, Recorder
from gptjax.training.results import finish
from gptjax.training.setup import TrainSetup, train_setup


def train(
    config: ConfigDict, workdir: Path, on_line: Callable[[Line], None] = lambda line: None, started: float | None = None
) -> dict[str, Any]:
    """Trains the run that `config` describes in `workdir`, or resumes it; returns its summary.

    Args:
      config: from gptjax.runs.config.read.
      workdir: absent, empty, or a run of the same config.
      on_line: called with each line of metrics.jsonl as it is written.
      started: time.monotonic() at the start of the process, so that its imports are counted; default: now.

    Raises:
      ConfigError, DataError, CheckpointError: user errors; nothing is written.
      Diverged: too many bad steps in a row, for the second time or before the first checkpoint.
      Interrupted: by a signal; the current step is saved.
    """
    started = time.monotonic() if started is None else started
    pretrained.check_exists(config, workdir)
    with foreign.resolve_pretrained(config, workdir) as origin:
        config = setups.resolve(config, workdir, origin)
        workdirs.check_free(workdir, config)
        summary = report.read_summary(workdir)
        if summary:
            console.say(f"{workdir} is finished; to train again, give another --workdir")
            return summary
        population = populations.of_one(train_setup(config, workdir, started, origin))
    return train_members(population, lambda member, line: on_line(line))[0] or {}


def train_population(
    all_configs: Sequence[ConfigDict],
    all_workdirs: Sequence[Path],
    on_line: OnLine = lambda member, line: None,
    started: float | None = None,
    evolution: Evolution | None = None,
) -> list[dict[str, Any] | None]:
    """Trains the runs of these configs in their directories as one program, or resumes them; returns their summaries.

    Args:
      all_configs: from gptjax.runs.config.read; they may differ only in keys of `members.TRACED` and in data.seed.
      all_workdirs: one directory per config; absent, empty, or a run of the same config.
      on_line: called with the member's number and each line of its metrics.jsonl.
      started: time.monotonic() at the start of the process, so that its imports are counted; default: now.
      evolution: population-based training; None: members train independently.

    Returns:
      The summary of each member, as returned by `train`; None for a member that diverged.

    Raises:
      ConfigError, DataError, CheckpointError: user errors; nothing is written.
      Interrupted: by a signal; the current step is saved.
    """
    started = time.monotonic() if started is None else started
    resolved = [setups.resolve(config, where) for config, where in zip(all_configs, all_workdirs, strict=True)]
    populations.check(resolved, all_configs, evolution)
    for config, where in zip(resolved, all_workdirs, strict=True):
        workdirs.check_free(where, config)
    done = [report.read_summary(where) for where in all_workdirs]
    if all(done):
        return list(done)
    return train_members(populations.build_population(resolved, all_workdirs, started, evolution), on_line, done)


def train_members(
    population: Population, on_line: OnLine, done: Sequence[dict[str, Any] | None] = (None,)
) -> list[dict[str, Any] | None]:
    """Trains all members of a population from where they are; `done` are the summaries of those that are finished."""
    clock, is_first = population.first.clock, processes.is_first()
    all_workdirs = [setup.workdir for setup in population.setups]
    with ExitStack() as stack:
        for workdir in all_workdirs if is_first else ():
            stack.enter_context(workdirs.lock(workdir))
        written = [stack.enter_context(open_checkpoints(setup)) for setup in population.setups]
        try:
            state = populations.init_or_restore(population, written)
            with goodput.record_clock(clock, all_workdirs, population.first.resumes_at, is_first):
                with interrupts.handle_signals() as stop_signal:
                    state = train_with_recovery(population, state, written, on_line, stop_signal)
                with clock.during("finish"), cpu_idle.keep_awake(jax.default_backend() == "cpu"):
                    return finish(population, state, done)
        except KeyboardInterrupt as error:
            for checkpoints in written:
                checkpoints.wait()
            saved = written[0].latest()
            status = f"saved at step {saved:,}; the same command resumes training" if saved else "nothing is saved yet"
            raise Interrupted.after(error, f"interrupted; {status}") from None


def open_checkpoints(setup: TrainSetup) -> Checkpoints:
    """Opens the run's checkpoints for writing."""
    c = setup.config.checkpoint
    return Checkpoints(setup.workdir, c.keep, c.keep_every, c.keep_best)


def train_with_recovery(
    population: Population,
    state: TrainState,
    written: Sequence[Checkpoints],
    on_line: OnLine,
    stop_signal: interrupts.StopSignal,
) -> TrainState:
    """Calls `train_steps`; after too many bad steps in a row, rolls back to the checkpoint before them and repeats."""
    try:
        return train_steps(population, state, written, on_line, stop_signal)
    except recovery.RollBack as bad:
        population = roll_back(population, written, bad)
    state = populations.init_or_restore(population, written)
    return train_with_recovery(population, state, written, on_line, stop_signal)


def handle_bad_steps(
    population: Population,
    written: Sequence[Checkpoints],
    current_state: Callable[[], TrainState],
    member: int,
    bad: recovery.RepeatedBadSteps,
) -> None:
    """Returns if a member of several has diverged; the others continue.

    Raises:
      RollBack: there is a checkpoint before the bad steps, and the member has not rolled back yet.
      Diverged: a single run has diverged. The report is written, as for members.
    """
    setup = population.setups[member]
    for checkpoints in written:
        checkpoints.wait()  # in all processes, before the first one lists the checkpoints
    saved = processes.broadcast(lambda: checkpoint_before(population, written, bad.first))
    if saved and not setup.left_out:
        raise recovery.RollBack(member, bad, saved, current_state())
    reason = recovery.report_divergence(setup, bad, population.select(current_state(), member))
    if population.size == 1:
        raise Diverged(reason)
    console.say(f"diverged   {setup.workdir}: {bad}; it stops here, the other members continue")


def checkpoint_before(population: Population, written: Sequence[Checkpoints], step: int) -> int:
    """Newest step before `step` of which every member has an undamaged checkpoint; 0 if there is none."""
    if population.size == 1:
        return written[0].newest_before(step) or 0
    return populations.newest_common_step([setup.workdir for setup in population.setups], step)


def roll_back(population: Population, written: Sequence[Checkpoints], bad: recovery.RollBack) -> Population:
    """Returns the population that resumes before the bad steps of a member, which leaves their batches out.

    Later checkpoints of all members are deleted, and the memory of the state is freed.
    """
    # In this order: a run that is killed in between meets the same bad steps again.
    for checkpoints in written:
        checkpoints.delete_after(bad.saved)
    setup = recovery.leave_out(population.setups[bad.member], bad.saved, bad.steps)
    jax.tree.map(lambda leaf: leaf.delete(), bad.state)
    if setup.clock.marked and setup.clock.marked[0] == bad.saved:
        setup.clock.lose(setup.clock.marked[1], setup.clock.reading())
    resumed = [
        (setup if m == bad.member else other)._replace(resumes_at=bad.saved)
        for m, other in enumerate(population.setups)
    ]
    return population._replace(setups=resumed)


def train_steps(
    population: Population,
    state: TrainState,
    written: Sequence[Checkpoints],
    on_line: OnLine,
    stop_signal: interrupts.StopSignal,
) -> TrainState:
    """Takes every remaining step, with the hooks that evaluate, save and stop."""
    setup = population.first
    c, clock, start, steps = setup.config, setup.clock, setup.resumes_at, setup.config.train.steps
    if start == steps:
        return state
    values = populations.member_values(population)
    with clock.during("compile"):
        step_fns = populations.compile_steps(population, values, state)
    if number := stop_signal(start):
        raise Interrupted(number)
    shapes = jax.eval_shape(lambda: population.select(state, 0))
    on_bad_steps = partial(handle_bad_steps, population, written, lambda: state)
    with (
        cpu_idle.keep_awake(jax.default_backend() == "cpu"),
        batches.prefetch(partial(populations.load_next_batch, population), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorder(population.setups, shapes, start, advance, on_line, on_bad_steps) as recorder,
        profiler.trace_steps(c.log.profile_steps, setup.workdir / "profile", recorder.pause, start) as trace,
        watchdog.watch_progress(c.train.hang_minutes, setup.workdir / "hang.txt", lambda: clock.kind) as beat,
        clock.during("step"),
    ):
        hooks = [
            Hook(lambda info: beat()),
            *evaluation_hooks(population, recorder, beat),
            Hook(partial(save_if_due, population, written, recorder, SaveSchedule(c.checkpoint, steps))),
            Hook(lambda info: trace(info.step)),
            Hook(partial(stop_if_signalled, population, written, recorder, stop_signal)),
        ]
        for step in range(start + 1, steps + 1):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with clock.during("data"):
                    batch = next(coming)
                state, step_metrics = populations.take_step(population, step_fns, values, state, step, batch)
                # The metrics of the previous step are read while the devices compute this one.
                recorder.write(recorder.take())
                recorder.push(step, step_metrics)
            info = run_hooks(hooks, StepInfo(step, state, values), steps)
            state, values = info.state, info.values
            if not any(recorder.alive):
                break
        with clock.during("save"):
            for m, checkpoints in enumerate(written):
                checkpoints.finish(population.select(state, m))
    return state


def evaluation_hooks(population: Population, recorder: Recorder, beat: Callable[[], None]) -> list[Hook]:
    """Returns the hooks that evaluate members on a sample of the held-out text, and let them evolve."""
    c, held_out_batches = population.first.config, population.first.batches.held_out
    sample = [held_out_batches[i] for i in batches.evenly_spaced(held_out_batches, c.eval.batches)]
    evaluate = partial(evaluate_sample, population, recorder, sample, beat)
    hooks = [Hook(evaluate, c.eval.every_steps, at_end=True)]
    if population.evolution:
        hooks.append(Hook(partial(evolve, population, recorder, evaluate), population.evolution.every_steps))
    return hooks


def evaluate_sample(
    population: Population,
    recorder: Recorder,
    sample: Sequence[batches.Batch],
    beat: Callable[[], None],
    info: StepInfo,
) -> StepInfo:
    """Evaluates all members on these batches, unless they are evaluated already, and writes a line of each."""
    if info.quality:
        return info
    lines = recorder.take(due=True)
    with population.first.clock.during("eval"):
        params = population.map(TrainState.eval_params)(info.state)
        quality = population.evaluate_all(params, sample, beat)
    recorder.write(lines, list(map(validation_metrics, quality)))
    return info._replace(quality=quality)


def validation_metrics(quality: Mapping[str, float]) -> dict[str, float]:
    """Selects the metrics of an evaluation that are logged, under "val/"."""
    return {f"val/{name}": value for name, value in quality.items() if name not in held_out.COUNT_METRICS}


def evolve(
    population: Population, recorder: Recorder, evaluate: Callable[[StepInfo], StepInfo], info: StepInfo
) -> StepInfo:
    """Replaces the worst members by copies of the best, except after the last step."""
    if info.step == population.first.config.train.steps:
        return info
    info = evaluate(info)
    values, state, replaced = populations.evolve(population, info.step, info.values, info.state, info.quality)
    for member, (source, config) in replaced.items():
        recorder.inherit(member, config, source)
    return info._replace(values=values, state=state)


def save_if_due(
    population: Population, written: Sequence[Checkpoints], recorder: Recorder, due: SaveSchedule, info: StepInfo
) -> StepInfo:
    """Starts to write checkpoints of all members if they are due, or one has become one of the best of its run.

    A state in a series of bad steps is not saved, except at the end.
    """
    for checkpoints in written:
        checkpoints.poll()
    is_best = any(
        checkpoints.is_among_best(quality["loss"])
        for checkpoints, quality in zip(written, info.quality, strict=False)  # none if they were not evaluated
    )
    if not should_save(due, info.step, written) and not is_best:
        return info
    recorder.write(recorder.take())
    if info.step < population.first.config.train.steps and not recorder.is_good():
        return info
    save(population, written, info)
    due.restart()
    return info._replace(saved=True)


def should_save(due: SaveSchedule, step: int, written: Sequence[Checkpoints]) -> bool:
    """Returns True if a checkpoint is due; with several processes, the clock of the first one decides."""
    if jax.process_count() > 1 and due.seconds == math.inf:
        return due(step)
    retries = [checkpoints.retry_at for checkpoints in written if checkpoints.retry_at is not None]
    return bool(processes.broadcast(lambda: due(step, max(retries, default=None))))


def save(population: Population, written: Sequence[Checkpoints], info: StepInfo) -> None:
    """Starts to write a checkpoint of each member, with its held-out loss if it is known.

    A diverged member is saved as well: all members have to resume from the same step.
    """
    with population.first.clock.during("save"):
        for m, checkpoints in enumerate(written):
            loss = info.quality[m]["loss"] if info.quality else None
            checkpoints.save(info.step, population.select(info.state, m), loss)
    population.first.clock.mark(info.step)


def stop_if_signalled(
    population: Population,
    written: Sequence[Checkpoints],
    recorder: Recorder,
    stop_signal: interrupts.StopSignal,
    info: StepInfo,
) -> None:
    """Saves the current step and exits if a signal asks for it.

    Raises:
      Interrupted: by a signal.
    """
    number = stop_signal(info.step)
    if not number:
        return
    recorder.write(recorder.take(due=True))
    if not info.saved:
        save(population, written, info)
    with population.first.clock.during("save"):
        for checkpoints in written:
            checkpoints.wait()
    population.first.clock.mark(info.step)
    raise Interrupted(number)
