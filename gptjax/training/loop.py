"""Training from config to summary: `train` is the whole way, the functions below it are its parts in order.

Everything a run leaves behind goes to its directory. Messages go to the console; nothing is printed to stdout.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import data, models, sharding
from gptjax.config.errors import Diverged, Interrupted
from gptjax.core import console, cpu_idle
from gptjax.data import batches
from gptjax.evals import held_out
from gptjax.finetune.paths import Flat
from gptjax.interop import foreign
from gptjax.optim.update_rules import with_fisher
from gptjax.runs import directory as workdirs
from gptjax.runs import pretrained
from gptjax.runs.checkpoint_policy import SaveSchedule
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import TrainState, initial, parameter_count, starting_from
from gptjax.sharding import processes
from gptjax.training import ewc, memory, recovery
from gptjax.training.monitoring import goodput, interrupts, metrics, profiler, report, samples, watchdog
from gptjax.training.monitoring.recorder import OnLine, Recorder
from gptjax.training.setup import TrainSetup, check, make_job
from gptjax.training.step import Step, of_config

# Keys of `config.model` that a run decides for itself although its model comes from elsewhere.
FREE_OF_IMPORT = ("dropout", "remat", "kernels")
FREE_OF_ORIGIN = (*FREE_OF_IMPORT, "scan_layers", *workdirs.TASK_HEAD)


def train(
    config: ConfigDict, workdir: Path, on_line: OnLine = lambda line: None, started: float | None = None
) -> dict[str, Any]:
    """Trains the run that `config` describes in `workdir`, or goes on with it; returns its summary.

    Args:
      config: as gptjax.config.read gives it.
      workdir: absent, empty, or this config's own.
      on_line: gets each line of metrics.jsonl as it is written.
      started: time.monotonic() at the start of the process, where its imports are to count; default: now.

    Raises:
      ConfigError, DataError, CheckpointError: what the user can mend; nothing is written then.
      Diverged: bad steps in a row, for the second time or before the first checkpoint.
      Interrupted: by a signal; the step in hand is saved.
    """
    started = time.monotonic() if started is None else started
    pretrained.check_there(config, workdir)
    with foreign.resolve_pretrained(config, workdir) as origin:
        config = resolved(config, workdir, origin)
        workdirs.check_free(workdir, config)
        summary = report.read_summary(workdir)
        if summary:
            console.say(f"{workdir} is finished; to train anew, give another --workdir")
            return summary
        job = make_job(config, workdir, started, origin)
    lock = workdirs.lock(workdir) if processes.is_first() else nullcontext()
    with lock, open_checkpoints(job) as checkpoints:
        try:
            state = begin(job, checkpoints)
            with goodput.kept(job.clock, workdir, int(state.step), processes.is_first()):
                with interrupts.noted() as asked:
                    state = take_all_steps(job, state, checkpoints, on_line, asked)
                with job.clock.during("finish"), cpu_idle.keep_awake(jax.default_backend() == "cpu"):
                    return finish(job, state)
        except KeyboardInterrupt as error:
            checkpoints.wait()
            saved = checkpoints.latest()
            there = f"saved at step {saved:,}; the same command goes on there" if saved else "nothing is saved yet"
            raise Interrupted.after(error, f"interrupted; {there}") from None


def resolved(config: ConfigDict, workdir: Path, origin: Path | None) -> ConfigDict:
    """The config of a run, resolved and checked, with the model of the run that it begins with, if there is one."""
    if origin:  # needed only at first: a run that has begun has a model of its own
        home = workdir if workdirs.is_run(workdir) else origin
        config = workdirs.with_model_of(home, config, FREE_OF_ORIGIN if origin != workdir else FREE_OF_IMPORT)
    config = configs.resolve(config)
    check(config)
    memory.check_config(config)
    return config if origin else data.with_tokenizer_of_sets(config)


def open_checkpoints(job: TrainSetup) -> Checkpoints:
    """The run's checkpoints, to write."""
    c = job.config.checkpoint
    return Checkpoints(job.workdir, c.keep, c.keep_every, c.keep_best)


def begin(job: TrainSetup, checkpoints: Checkpoints) -> TrainState:
    """The state that the run goes on from, or the first one, on the devices."""
    shapes = shapes_of(job)
    there = sharding.of_state(job.mesh, shapes)
    if job.resumes_at:
        state = checkpoints.restore(shapes_on(shapes, there), job.resumes_at)
        if job.origin and shapes.frozen:
            state = state.replace(frozen=begin_from(base_of(job.origin, job), job).frozen)
        console.say(f"resuming   at step {int(state.step):,} of {job.config.train.steps:,}")
    elif job.origin:
        base = base_of(job.origin, job)
        fisher = remember(job.memory, job, base) if job.memory else {}
        state = begin_from(base, job)
        state = state.replace(opt_state=with_fisher(state.opt_state, fisher))
        console.say(f"beginning  with the parameters of {job.origin}")
    else:
        # A program that runs once: the time to make it counts, and without optimisation it draws the same numbers.
        make = jax.jit(start_of(job), out_shardings=there, compiler_options={"xla_backend_optimization_level": "0"})
        state = make()
    checkpoints.set_aside_after(job.resumes_at)
    devices = f"{job.mesh.size} {jax.devices()[0].device_kind} device{'s' * (job.mesh.size > 1)}"
    arch, dtype = job.config.model.arch, job.config.train.dtype
    count, trained = parameter_count(state.eval_shapes()), parameter_count(state.params)
    console.say(f"model      {arch}, {count:,} parameters, {dtype}, on {devices}")
    if state.frozen:
        console.say(f"finetune   {job.config.finetune.method}: {trained:,} parameters train, {trained / count:.2%}")
    packed = job.config.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(job.model.config, dtype, packed)}")
    if metrics.peak_flops(jax.devices()[0].device_kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")
    return state


def start_of(job: TrainSetup) -> Callable[[], TrainState]:
    """A function that makes the first state of a run that begins with random parameters."""
    return partial(initial, job.model, job.optimizer, job.config.seed)


def shapes_of(job: TrainSetup) -> TrainState:
    """The shapes of the run's state."""
    if not job.origin or not pretrained.is_part(job.config):
        return jax.eval_shape(start_of(job))
    return jax.eval_shape(begins_from(job), pretrained.base_shapes(job.origin, job.config))


def begins_from(job: TrainSetup) -> Callable[[Any], TrainState]:
    """A function that makes the first state of a run that begins with another's parameters."""
    return lambda base: starting_from(base, job.model, job.optimizer, job.config)


def base_of(origin: Path, job: TrainSetup) -> Any:
    """The parameters that the run begins with: another's newest, or those it was imported with."""
    base = (
        pretrained.base_params(origin, job.config, job.mesh)
        if origin != job.workdir
        else pretrained.saved(origin, job.mesh)
    )
    if pretrained.is_part(job.config):
        pretrained.record_base(job.workdir, base)
    return base


def remember(memory: ewc.Memory, job: TrainSetup, base: Any) -> Flat:
    """What of the base the run is to remember, by path; see gptjax.training.ewc."""
    return ewc.remembered(memory, job.config, base, shapes_of(job).params, job.workdir, job.mesh)


def begin_from(base: Any, job: TrainSetup) -> TrainState:
    """The first state of a run that begins with these parameters, whose memory it takes."""
    there = sharding.of_state(job.mesh, shapes_of(job))
    given = () if job.config.finetune.quantise != "none" else 0  # else of no use: nothing becomes as large as they are
    return jax.jit(begins_from(job), out_shardings=there, donate_argnums=given)(base)


def compiled_steps(job: TrainSetup, state: TrainState) -> dict[tuple[int, int], Step]:
    """The train step by [B, T], compiled for each shape that lies ahead; no step's time holds the compiler's."""
    step = of_config(job.config, job.objective, job.optimizer, job.mesh, state)
    now = batches.stage_of(int(state.step) + 1, job.stages)
    compiled: dict[tuple[int, int], Step] = {}
    for stage in job.stages[job.stages.index(now) :]:
        batch = placed(job, max(stage.start, int(state.step)))
        shape = shape_of(batch)
        if shape in compiled:
            continue
        start = time.monotonic()
        compiled[shape] = step.lower(state, batch).compile()
        of_shape = f" for {shape[0]} x {shape[1]} tokens" if len(job.stages) > 1 else ""
        console.say(f"compiled   in {time.monotonic() - start:.1f} s{of_shape}")
    return compiled


def shape_of(batch: Mapping[str, jax.Array]) -> tuple[int, int]:
    """[B, T] of what a batch's model reads, which an objective may have made shorter than data.context."""
    B, *_, T = batch["inputs_BT"].shape
    return B, T


def placed(job: TrainSetup, index: int) -> dict[str, jax.Array]:
    """The batch of step `index` + 1, on the devices."""
    return job.teach(sharding.place(job.train_batches[index], job.mesh, *job.train_batches.share))


def placed_unless_left_out(job: TrainSetup, index: int) -> dict[str, jax.Array] | None:
    """The same; None where the run leaves that step out."""
    return None if recovery.is_left_out(job, index + 1) else placed(job, index)


def advanced(
    job: TrainSetup,
    step_fns: dict[tuple[int, int], Step],
    state: TrainState,
    step: int,
    batch: dict[str, jax.Array] | None,
) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step, whose batch is None where it is left out, and the step's metrics."""
    if batch is None:
        return recovery.passed_over(state)
    return step_fns[shape_of(batch)](recovery.entering(job, state, step), batch)


def take_all_steps(
    job: TrainSetup, state: TrainState, checkpoints: Checkpoints, on_line: OnLine, asked: interrupts.Asked
) -> TrainState:
    """`take_steps`, and where bad steps in a row end it, once more from the newest checkpoint before them."""
    try:
        return take_steps(job, state, checkpoints, on_line, asked)
    except recovery.BadRun as bad:
        job = recovery.go_back(job, checkpoints, bad)
    return take_all_steps(job, begin(job, checkpoints), checkpoints, on_line, asked)


def take_steps(
    job: TrainSetup, state: TrainState, checkpoints: Checkpoints, on_line: OnLine, asked: interrupts.Asked
) -> TrainState:
    """Every step from the state's to the last, with evaluations, checkpoints and metrics along the way."""
    c, clock = job.config, job.clock
    start, steps = int(state.step), c.train.steps
    if start == steps:
        return state
    with clock.during("compile"):
        step_fns = compiled_steps(job, state)
    if number := asked(start):
        raise Interrupted(number)
    sample = [job.eval_batches[i] for i in batches.evenly_spaced(job.eval_batches, c.eval.batches)]
    due = SaveSchedule(c.checkpoint, steps)
    with (
        recovery.with_state(lambda: state),
        cpu_idle.keep_awake(jax.default_backend() == "cpu"),
        batches.prefetch(partial(placed_unless_left_out, job), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorder(job, state, advance, on_line) as recorder,
        profiler.tracing(c.log.profile_steps, job.workdir / "profile", recorder.paused) as traced,
        watchdog.watched(c.train.hang_minutes, job.workdir / "hang.txt", lambda: clock.kind) as beat,
        clock.during("step"),
    ):
        for step in range(start + 1, steps + 1):
            with traced(step):
                with clock.during("data"):
                    batch = next(coming)
                state, values = advanced(job, step_fns, state, step, batch)
                # The numbers of the step before are read while the devices work on this one.
                recorder.write(recorder.take())
                recorder.push(step, values)
            beat()
            evaluates = step % c.eval.every_steps == 0 or step == steps
            checkpoints.poll()
            saves = is_due(due, step, checkpoints)
            if evaluates or saves:
                line, found = recorder.take(due=evaluates), {}
                if evaluates:
                    with clock.during("eval"):
                        found = job.held_out_quality(state.eval_params(), sample, advance=beat)
                recorder.write(line | shown(found))
                good = step == steps or not recorder.verdicts.bad_in_a_row
                saves = good and (saves or checkpoints.is_among_best(found.get("loss")))
                if saves:
                    save(job, step, state, checkpoints, found.get("loss"))
                    due.restart()
            if number := asked(step):
                recorder.write(recorder.take(due=True))
                leave(number, job, step, state, checkpoints, saves)
        with clock.during("save"):
            checkpoints.finish(state)
    return state


def shown(found: Mapping[str, float]) -> dict[str, float]:
    """What a line of metrics says of a look at held-out text."""
    return {f"val/{name}": value for name, value in found.items() if name not in held_out.COUNTS}


def is_due(due: SaveSchedule, step: int, checkpoints: Checkpoints) -> bool:
    """Whether to save after this step; of several processes the first one's clock decides, where one does."""
    if jax.process_count() > 1 and due.seconds == math.inf:
        return due(step)
    return bool(processes.of_first(lambda: due(step, checkpoints.retry_at)))


def save(job: TrainSetup, step: int, state: TrainState, checkpoints: Checkpoints, loss: float | None = None) -> None:
    """Begins to write a checkpoint, of that held-out loss where it is known."""
    with job.clock.during("save"):
        checkpoints.save(step, state, loss)
    job.clock.mark(step)


def leave(
    number: int, job: TrainSetup, step: int, state: TrainState, checkpoints: Checkpoints, saved: bool
) -> NoReturn:
    """Writes a checkpoint of the step in hand, unless it is `saved` already, and leaves for that signal.

    Raises:
      Interrupted: always.
    """
    if not saved:
        save(job, step, state, checkpoints)
    with job.clock.during("save"):
        checkpoints.wait()
    job.clock.mark(step)
    raise Interrupted(number)


def finish(job: TrainSetup, state: TrainState) -> dict[str, Any]:
    """Reads all held-out text, writes samples, plot and summary, and returns the summary."""
    params = state.eval_params()
    every = (job.eval_batches[i] for i in range(len(job.eval_batches)))
    with console.bar("reading all held-out text", len(job.eval_batches)) as advance, job.clock.during("eval"):
        quality = job.held_out_quality(params, every, advance=advance)
    return written(job, params, quality)


def written(job: TrainSetup, params: Any, quality: dict[str, float]) -> dict[str, Any]:
    """Writes samples, plot and summary of a run that ends with these parameters, and returns the summary.

    Raises:
      Diverged: it is of no use.
    """
    c = job.config
    if not math.isfinite(quality["loss"]):
        raise Diverged(f"training diverged: the held-out loss is {quality['loss']}; try a lower learning rate")
    if "bits_per_byte" in quality and not c.data.examples.form:  # of which answers alone are predicted
        quality |= held_out.compressors(job.data.held_out_text)
    params = processes.by_all(params)
    sample = samples.sample(job, params)

    def write() -> dict[str, Any]:
        summary = report.summarise(job.workdir, c.train.steps, parameter_count(params), quality)
        return report.write(job.workdir, summary, sample, job.clock)

    return processes.first_does(write, "the summary is written") or report.read_summary(job.workdir) or {}
