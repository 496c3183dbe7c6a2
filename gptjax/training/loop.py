"""Training from config to summary: `train` is the whole way, the functions below it are its parts in order.

Everything a run leaves behind goes to its directory. Messages go to the console; nothing is printed to stdout.
"""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import console, data, models, optim, random, sharding, wakeful
from gptjax import workdir as workdirs
from gptjax.config import Diverged
from gptjax.data import batches
from gptjax.decode import generate as decoding
from gptjax.evals import held_out
from gptjax.models.stacking import stack, unstack
from gptjax.training import metrics, profile, recovery, report
from gptjax.training.checkpoints import Checkpoints, shapes_on
from gptjax.training.job import CHOICES, Job, make_job
from gptjax.training.recorder import OnLine, Recorder
from gptjax.training.state import TrainState, initial, parameter_count, starting_with
from gptjax.training.step import Step, of_config

# Keys of `config.model` that a run decides for itself although its model comes from elsewhere.
FREE_OF_IMPORT = ("dropout", "remat", "kernels")
FREE_OF_ORIGIN = (*FREE_OF_IMPORT, "scan_layers")


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
    """
    started = time.monotonic() if started is None else started
    origin = workdirs.origin(config, workdir)
    if origin:  # needed only at first: a run that has begun has a model of its own
        home = workdir if workdirs.is_run(workdir) else origin
        config = workdirs.with_model_of(home, config, FREE_OF_ORIGIN if origin != workdir else FREE_OF_IMPORT)
    config = configs.resolve(config)
    configs.check(config, jax.device_count(), CHOICES)
    if not origin:
        config = data.with_tokenizer_of_sets(config)
    workdirs.check_free(workdir, config)
    summary = report.read_summary(workdir)
    if summary:
        console.say(f"{workdir} is finished; to train anew, give another --workdir")
        return summary
    job = make_job(config, workdir, started, origin)
    with workdirs.lock(workdir), Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        state = begin(job, checkpoints)
        try:
            state = take_all_steps(job, state, checkpoints, on_line)
        except KeyboardInterrupt:
            saved = checkpoints.latest() or 0
            raise KeyboardInterrupt(f"interrupted; the same command goes on at step {saved}") from None
        checkpoints.wait()
        return finish(job, state)


def begin(job: Job, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest checkpoint, or the first one, on the devices."""
    whole = sharding.replicated(job.mesh)

    def start() -> TrainState:
        return initial(job.model, job.optimizer, job.config.seed)

    if checkpoints.latest():
        state = checkpoints.restore(shapes_on(jax.eval_shape(start), whole))
        console.say(f"resuming   at step {int(state.step):,} of {job.config.train.steps:,}")
    elif job.origin:
        state = begin_from(job.origin, job)
        console.say(f"beginning  with the parameters of {job.origin}")
    else:
        state = jax.jit(start, out_shardings=whole)()
    devices = f"{job.mesh.size} {jax.devices()[0].device_kind} device{'s' * (job.mesh.size > 1)}"
    arch, dtype = job.config.model.arch, job.config.train.dtype
    console.say(f"model      {arch}, {parameter_count(state.params):,} parameters, {dtype}, on {devices}")
    packed = job.config.data.layout == "packed"
    console.say(f"attention  {models.kernels.attention_plan(job.model.config, dtype, packed)}")
    if metrics.peak_flops(jax.devices()[0].device_kind):
        console.say(f"mfu        {metrics.MFU_CONVENTION}")
    return state


def begin_from(origin: Path, job: Job) -> TrainState:
    """The first state of a run that begins with another's newest parameters, or with those it was imported with."""
    whole, theirs = sharding.replicated(job.mesh), workdirs.read_config(origin)
    like = shapes_on(models.shapes(models.build(theirs.model)), whole)
    params = Checkpoints(origin).restore_params(like)
    if theirs.model.scan_layers != job.config.model.scan_layers:
        params = stack(params) if job.config.model.scan_layers else unstack(params)
    return jax.jit(lambda params: starting_with(params, job.optimizer), out_shardings=whole, donate_argnums=0)(params)


def compiled_steps(job: Job, state: TrainState) -> dict[tuple[int, int], Step]:
    """The train step by [B, T], compiled for each shape that lies ahead; no step's time holds the compiler's."""
    step = of_config(job.config, job.objective, job.optimizer, job.mesh)
    now = batches.stage_of(int(state.step) + 1, job.stages)
    compiled: dict[tuple[int, int], Step] = {}
    for stage in job.stages[job.stages.index(now) :]:
        shape = stage.batch_size, stage.context
        if shape in compiled:
            continue
        start = time.monotonic()
        batch = placed(job, max(stage.start, int(state.step)))
        compiled[shape] = step.lower(state, batch).compile()
        of_shape = f" for {shape[0]} x {shape[1]} tokens" if len(job.stages) > 1 else ""
        console.say(f"compiled   in {time.monotonic() - start:.1f} s{of_shape}")
    return compiled


def placed(job: Job, index: int) -> dict[str, jax.Array]:
    """The batch of step `index` + 1, on the devices."""
    return sharding.place(job.train_batches[index], job.mesh)


def placed_unless_left_out(job: Job, index: int) -> dict[str, jax.Array] | None:
    """The same; None where the run leaves that step out."""
    return None if recovery.is_left_out(job, index + 1) else placed(job, index)


def advanced(
    job: Job, step_fns: dict[tuple[int, int], Step], state: TrainState, step: int, batch: dict[str, jax.Array] | None
) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step, whose batch is None where it is left out, and the step's metrics."""
    if batch is None:
        return recovery.passed_over(state)
    B, T = batch["inputs_BT"].shape
    return step_fns[B, T](recovery.entering(job, state, step), batch)


def take_all_steps(job: Job, state: TrainState, checkpoints: Checkpoints, on_line: OnLine) -> TrainState:
    """`take_steps`, and where bad steps in a row end it, once more from the newest checkpoint before them."""
    try:
        return take_steps(job, state, checkpoints, on_line)
    except recovery.BadRun as bad:
        job = recovery.go_back(job, checkpoints, bad)
    return take_all_steps(job, begin(job, checkpoints), checkpoints, on_line)


def take_steps(job: Job, state: TrainState, checkpoints: Checkpoints, on_line: OnLine) -> TrainState:
    """Every step from the state's to the last, with evaluations, checkpoints and metrics along the way."""
    c = job.config
    start, steps = int(state.step), c.train.steps
    if start == steps:
        return state
    step_fns = compiled_steps(job, state)
    sample = [job.eval_batches[i] for i in batches.spread(job.eval_batches, c.eval.batches)]
    with (
        recovery.with_state(lambda: state),
        wakeful.wakeful(jax.default_backend() == "cpu"),
        batches.prefetched(partial(placed_unless_left_out, job), start, steps, c.data.prefetch) as coming,
        console.bar("training", steps, done=start) as advance,
        Recorder(job, state, advance, on_line) as recorder,
        profile.tracing(c.log.profile_steps, job.workdir / "profile", recorder.paused) as traced,
    ):
        for step in range(start + 1, steps + 1):
            with traced(step):
                with recorder.waiting():
                    batch = next(coming)
                state, values = advanced(job, step_fns, state, step, batch)
                # The numbers of the step before are read while the devices work on this one.
                recorder.write(recorder.take())
                recorder.push(step, values)
            evaluates = step % c.eval.every_steps == 0 or step == steps
            saves = step % c.checkpoint.every_steps == 0 or step == steps
            if evaluates or saves:
                line = recorder.take(due=True)
                found = job.held_out_loss(optim.answering(state.opt_state, state.params), sample) if evaluates else {}
                recorder.write(line | {f"val/{name}": found[name] for name in ("loss", "bits_per_byte") if found})
                if saves and (step == steps or not recorder.verdicts.bad_in_a_row):
                    checkpoints.save(step, state)
                recorder.restart_clock()
    return state


def finish(job: Job, state: TrainState) -> dict[str, Any]:
    """Reads all held-out text, writes samples, plot and summary, and returns the summary."""
    c = job.config
    params = optim.answering(state.opt_state, state.params)
    every = (job.eval_batches[i] for i in range(len(job.eval_batches)))
    with console.bar("reading all held-out text", len(job.eval_batches)) as advance:
        quality = job.held_out_loss(params, every, advance=advance)
    if not math.isfinite(quality["loss"]):
        raise Diverged(f"training diverged: the held-out loss is {quality['loss']}; try a lower learning rate")
    quality |= held_out.compressors(job.data.held_out_text)
    speaker = decoding.speaker(job.model, params, job.data.tokenizer, c.model.context)
    sample = decoding.generate(speaker, c.sample.prompt, job.sample_settings, random.key(c.seed, "sample", 0))
    summary = report.summarise(job.workdir, c.train.steps, parameter_count(params), quality, job.seconds())
    report.write(job.workdir, summary, c.sample.prompt + sample.text)
    return summary
