"""The training loop, from config to summary: `train` calls the functions below it in order.

All outputs go to the run's directory. Messages go to the console; nothing is printed to stdout.
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
from gptjax.runs.train_state import TrainState, init_from_base, init_state, parameter_count
from gptjax.sharding import processes
from gptjax.training import ewc, memory, recovery
from gptjax.training.monitoring import goodput, interrupts, metrics, profiler, report, samples, watchdog
from gptjax.training.monitoring.recorder import OnLine, Recorder
from gptjax.training.setup import TrainSetup, check, train_setup
from gptjax.training.step import Step, make_train_step

# Keys of `config.model` that a run may override when its model was imported, or comes from another run.
IMPORT_OVERRIDES = ("dropout", "remat", "kernels")
PRETRAINED_OVERRIDES = (*IMPORT_OVERRIDES, "scan_layers", *workdirs.TASK_HEAD)


def train(
    config: ConfigDict, workdir: Path, on_line: OnLine = lambda line: None, started: float | None = None
) -> dict[str, Any]:
    """Trains the run that `config` describes in `workdir`, or resumes it; returns its summary.

    Args:
      config: from gptjax.config.read.
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
        config = resolve_config(config, workdir, origin)
        workdirs.check_free(workdir, config)
        summary = report.read_summary(workdir)
        if summary:
            console.say(f"{workdir} is finished; to train again, give another --workdir")
            return summary
        setup = train_setup(config, workdir, started, origin)
    lock = workdirs.lock(workdir) if processes.is_first() else nullcontext()
    with lock, open_checkpoints(setup) as checkpoints:
        try:
            state = init_or_restore_state(setup, checkpoints)
            with goodput.record_clock(setup.clock, workdir, int(state.step), processes.is_first()):
                with interrupts.handle_signals() as stop_signal:
                    state = train_with_recovery(setup, state, checkpoints, on_line, stop_signal)
                with setup.clock.during("finish"), cpu_idle.keep_awake(jax.default_backend() == "cpu"):
                    return finish(setup, state)
        except KeyboardInterrupt as error:
            checkpoints.wait()
            saved = checkpoints.latest()
            status = f"saved at step {saved:,}; the same command resumes training" if saved else "nothing is saved yet"
            raise Interrupted.after(error, f"interrupted; {status}") from None


def resolve_config(config: ConfigDict, workdir: Path, origin: Path | None) -> ConfigDict:
    """Resolves and checks the config of a run; its model is that of the run at `origin`, if there is one."""
    if origin:  # needed only to create the run, whose own config then has the model
        home = workdir if workdirs.is_run(workdir) else origin
        config = workdirs.with_model_of(home, config, PRETRAINED_OVERRIDES if origin != workdir else IMPORT_OVERRIDES)
    config = configs.resolve(config)
    check(config)
    memory.check_config(config)
    return config if origin else data.with_tokenizer_of_sets(config)


def open_checkpoints(setup: TrainSetup) -> Checkpoints:
    """Opens the run's checkpoints for writing."""
    c = setup.config.checkpoint
    return Checkpoints(setup.workdir, c.keep, c.keep_every, c.keep_best)


def init_or_restore_state(setup: TrainSetup, checkpoints: Checkpoints) -> TrainState:
    """Restores the state to resume from, or initializes it, on the devices."""
    shapes = state_shapes(setup)
    shardings = sharding.state_shardings(setup.mesh, shapes)
    if setup.resumes_at:
        state = checkpoints.restore(shapes_on(shapes, shardings), setup.resumes_at)
        if setup.origin and shapes.frozen:
            state = state.replace(frozen=init_state_from_base(load_base_params(setup.origin, setup), setup).frozen)
        console.say(f"resuming   at step {int(state.step):,} of {setup.config.train.steps:,}")
    elif setup.origin:
        base = load_base_params(setup.origin, setup)
        fisher = fisher_information(setup.fisher_data, setup, base) if setup.fisher_data else {}
        state = init_state_from_base(base, setup)
        state = state.replace(opt_state=with_fisher(state.opt_state, fisher))
        console.say(f"starting   from the parameters of {setup.origin}")
    else:
        # The program runs once, so its compilation time matters; without optimization it draws the same numbers.
        make = jax.jit(
            init_fn(setup), out_shardings=shardings, compiler_options={"xla_backend_optimization_level": "0"}
        )
        state = make()
    checkpoints.quarantine_after(setup.resumes_at)
    devices = f"{setup.mesh.size} {jax.devices()[0].device_kind} device{'s' * (setup.mesh.size > 1)}"
    arch, dtype = setup.config.model.arch, setup.config.train.dtype
    count, trained = parameter_count(state.eval_shapes()), parameter_count(state.params)
    console.say(f"model      {arch}, {count:,} parameters, {dtype}, on {devices}")
    if state.frozen:
        console.say(f"finetune   {setup.config.finetune.method}: {trained:,} parameters train, {trained / count:.2%}")
    packed = setup.config.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(setup.model.config, dtype, packed)}")
    if metrics.peak_flops(jax.devices()[0].device_kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")
    return state


def init_fn(setup: TrainSetup) -> Callable[[], TrainState]:
    """Returns a function that initializes the state with random parameters."""
    return partial(init_state, setup.model, setup.optimizer, setup.config.seed)


def state_shapes(setup: TrainSetup) -> TrainState:
    """Shapes of the train state."""
    if not setup.origin or not pretrained.is_partial(setup.config):
        return jax.eval_shape(init_fn(setup))
    return jax.eval_shape(init_from_base_fn(setup), pretrained.base_shapes(setup.origin, setup.config))


def init_from_base_fn(setup: TrainSetup) -> Callable[[Any], TrainState]:
    """Returns a function `base parameters -> state` that initializes the state of a run with an origin."""
    return lambda base: init_from_base(base, setup.model, setup.optimizer, setup.config)


def load_base_params(origin: Path, setup: TrainSetup) -> Any:
    """Loads the parameters that the run starts from: the newest of its origin, or those it was imported with."""
    base = (
        pretrained.base_params(origin, setup.config, setup.mesh)
        if origin != setup.workdir
        else pretrained.load_params(origin, setup.mesh)
    )
    if pretrained.is_partial(setup.config):
        pretrained.record_base(setup.workdir, base)
    return base


def fisher_information(fisher_data: ewc.FisherData, setup: TrainSetup, base: Any) -> Flat:
    """Estimates the Fisher information of the base parameters, by path; see gptjax.training.ewc."""
    return ewc.fisher_information(
        fisher_data, setup.config, base, state_shapes(setup).params, setup.workdir, setup.mesh
    )


def init_state_from_base(base: Any, setup: TrainSetup) -> TrainState:
    """Initializes the state from these parameters, whose buffers are donated."""
    shardings = sharding.state_shardings(setup.mesh, state_shapes(setup))
    donated = () if setup.config.finetune.quantise != "none" else 0  # no quantized output is as large as they are
    return jax.jit(init_from_base_fn(setup), out_shardings=shardings, donate_argnums=donated)(base)


def compile_steps(setup: TrainSetup, state: TrainState) -> dict[tuple[int, int], Step]:
    """Compiles the train step for each remaining shape [B, T], so that no step time includes compilation."""
    step = make_train_step(setup.config, setup.objective, setup.optimizer, setup.mesh, state)
    current = batches.stage_of(int(state.step) + 1, setup.stages)
    compiled: dict[tuple[int, int], Step] = {}
    for stage in setup.stages[setup.stages.index(current) :]:
        batch = load_batch(setup, max(stage.start, int(state.step)))
        shape = batch_shape(batch)
        if shape in compiled:
            continue
        start = time.monotonic()
        compiled[shape] = step.lower(state, batch).compile()
        suffix = f" for {shape[0]} x {shape[1]} tokens" if len(setup.stages) > 1 else ""
        console.say(f"compiled   in {time.monotonic() - start:.1f} s{suffix}")
    return compiled


def batch_shape(batch: Mapping[str, jax.Array]) -> tuple[int, int]:
    """Returns [B, T] of the model's inputs; an objective may make T shorter than data.context."""
    B, *_, T = batch["inputs_BT"].shape
    return B, T


def load_batch(setup: TrainSetup, index: int) -> dict[str, jax.Array]:
    """Loads the batch of step `index` + 1 on the devices."""
    return setup.teacher_fn(sharding.place_batch(setup.train_batches[index], setup.mesh, *setup.train_batches.share))


def load_batch_unless_left_out(setup: TrainSetup, index: int) -> dict[str, jax.Array] | None:
    """Loads the batch like `load_batch`; returns None if the run leaves that step out."""
    return None if recovery.is_left_out(setup, index + 1) else load_batch(setup, index)


def run_step(
    setup: TrainSetup,
    step_fns: dict[tuple[int, int], Step],
    state: TrainState,
    step: int,
    batch: dict[str, jax.Array] | None,
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step; returns the new state and the metrics. A batch of None leaves the step out."""
    if batch is None:
        return recovery.skip_batch(state)
    return step_fns[batch_shape(batch)](recovery.reset_statistics(setup, state, step), batch)


def train_with_recovery(
    setup: TrainSetup, state: TrainState, checkpoints: Checkpoints, on_line: OnLine, stop_signal: interrupts.StopSignal
) -> TrainState:
    """Calls `train_steps`; after too many bad steps in a row, rolls back to the checkpoint before them and repeats."""
    try:
        return train_steps(setup, state, checkpoints, on_line, stop_signal)
    except recovery.RepeatedBadSteps as bad:
        setup = recovery.roll_back(setup, checkpoints, bad)
    return train_with_recovery(setup, init_or_restore_state(setup, checkpoints), checkpoints, on_line, stop_signal)


def train_steps(
    setup: TrainSetup, state: TrainState, checkpoints: Checkpoints, on_line: OnLine, stop_signal: interrupts.StopSignal
) -> TrainState:
    """Takes every remaining step, with evaluations, checkpoints and metrics."""
    c, clock = setup.config, setup.clock
    start, steps = int(state.step), c.train.steps
    if start == steps:
        return state
    with clock.during("compile"):
        step_fns = compile_steps(setup, state)
    if number := stop_signal(start):
        raise Interrupted(number)
    sample = [setup.eval_batches[i] for i in batches.evenly_spaced(setup.eval_batches, c.eval.batches)]
    due = SaveSchedule(c.checkpoint, steps)
    with (
        recovery.attach_state(lambda: state),
        cpu_idle.keep_awake(jax.default_backend() == "cpu"),
        batches.prefetch(partial(load_batch_unless_left_out, setup), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorder(setup, state, advance, on_line) as recorder,
        profiler.trace_steps(c.log.profile_steps, setup.workdir / "profile", recorder.pause) as traced,
        watchdog.watch_progress(c.train.hang_minutes, setup.workdir / "hang.txt", lambda: clock.kind) as beat,
        clock.during("step"),
    ):
        for step in range(start + 1, steps + 1):
            with traced(step):
                with clock.during("data"):
                    batch = next(coming)
                state, values = run_step(setup, step_fns, state, step, batch)
                # The metrics of the previous step are read while the devices compute this one.
                recorder.write(recorder.take())
                recorder.push(step, values)
            beat()
            evaluates = step % c.eval.every_steps == 0 or step == steps
            checkpoints.poll()
            saves = should_save(due, step, checkpoints)
            if evaluates or saves:
                line, quality = recorder.take(due=evaluates), {}
                if evaluates:
                    with clock.during("eval"):
                        quality = setup.evaluate(state.eval_params(), sample, advance=beat)
                recorder.write(line | validation_metrics(quality))
                good = step == steps or not recorder.bad_steps.bad_in_a_row
                saves = good and (saves or checkpoints.is_among_best(quality.get("loss")))
                if saves:
                    save(setup, step, state, checkpoints, quality.get("loss"))
                    due.restart()
            if number := stop_signal(step):
                recorder.write(recorder.take(due=True))
                save_and_exit(number, setup, step, state, checkpoints, saves)
        with clock.during("save"):
            checkpoints.finish(state)
    return state


def validation_metrics(quality: Mapping[str, float]) -> dict[str, float]:
    """Selects the metrics of an evaluation that are logged, under "val/"."""
    return {f"val/{name}": value for name, value in quality.items() if name not in held_out.COUNT_METRICS}


def should_save(due: SaveSchedule, step: int, checkpoints: Checkpoints) -> bool:
    """Returns True if a checkpoint is due; with several processes, the clock of the first one decides."""
    if jax.process_count() > 1 and due.seconds == math.inf:
        return due(step)
    return bool(processes.broadcast(lambda: due(step, checkpoints.retry_at)))


def save(setup: TrainSetup, step: int, state: TrainState, checkpoints: Checkpoints, loss: float | None = None) -> None:
    """Starts to write a checkpoint, with its held-out loss if it is known."""
    with setup.clock.during("save"):
        checkpoints.save(step, state, loss)
    setup.clock.mark(step)


def save_and_exit(
    number: int, setup: TrainSetup, step: int, state: TrainState, checkpoints: Checkpoints, saved: bool
) -> NoReturn:
    """Saves the current step, unless it is `saved` already, and exits for the signal `number`.

    Raises:
      Interrupted: always.
    """
    if not saved:
        save(setup, step, state, checkpoints)
    with setup.clock.during("save"):
        checkpoints.wait()
    setup.clock.mark(step)
    raise Interrupted(number)


def finish(setup: TrainSetup, state: TrainState) -> dict[str, Any]:
    """Evaluates on all held-out text, writes samples, plot and summary, and returns the summary."""
    params = state.eval_params()
    held_out_batches = (setup.eval_batches[i] for i in range(len(setup.eval_batches)))
    with console.bar("reading all held-out text", len(setup.eval_batches)) as advance, setup.clock.during("eval"):
        quality = setup.evaluate(params, held_out_batches, advance=advance)
    return write_results(setup, params, quality)


def write_results(setup: TrainSetup, params: Any, quality: dict[str, float]) -> dict[str, Any]:
    """Writes samples, plot and summary of a run with these final parameters, and returns the summary.

    Raises:
      Diverged: the held-out loss is not finite.
    """
    c = setup.config
    if not math.isfinite(quality["loss"]):
        raise Diverged(f"training diverged: the held-out loss is {quality['loss']}; try a lower learning rate")
    if "bits_per_byte" in quality and not c.data.examples.form:  # with examples, only the answers are predicted
        quality |= held_out.compressors(setup.data.held_out_text)
    params = processes.gather(params)
    sample = samples.sample(setup, params)

    def write() -> dict[str, Any]:
        summary = report.summarize(setup.workdir, c.train.steps, parameter_count(params), quality)
        return report.write(setup.workdir, summary, sample, setup.clock)

    return processes.run_on_first(write, "the summary is written") or report.read_summary(setup.workdir) or {}
