"""Training from config to summary: `train` is the whole way, the functions below it are its parts in order.

Everything a run leaves behind goes to its directory. Messages go to the console; nothing is printed to stdout.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import console, data, models, random, run, sharding
from gptjax.data import batches, tokenizers
from gptjax.decode import generate as decoding
from gptjax.evals import held_out
from gptjax.objectives import OBJECTIVES
from gptjax.objectives.causal import Objective
from gptjax.optim import optimizer
from gptjax.training import report
from gptjax.training.checkpoints import Checkpoints, shapes_on
from gptjax.training.recorder import OnLine, Recorder
from gptjax.training.state import TrainState, initial, parameter_count
from gptjax.training.step import Step, eval_step, jitted, train_step
from gptjax.training.writers import read_metrics


class Job(NamedTuple):
    """All that stays the same while a run trains."""

    config: ConfigDict
    workdir: Path
    started: float  # time.monotonic() when the command began
    spent: float  # seconds of earlier sessions of the run
    data: data.Data
    mesh: Mesh
    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    eval_step: Callable[[Any, Any], jax.Array]
    train_batches: grain.MapDataset
    eval_batches: grain.MapDataset

    def seconds(self) -> float:
        """Wall time of the run so far, earlier sessions included."""
        return self.spent + time.monotonic() - self.started

    def held_out_loss(self, params: Any, some: Iterable[Any], **kwargs: Any) -> dict[str, float]:
        """Loss over some batches of held-out text, as gptjax.evals.held_out.loss_of gives it."""
        return held_out.loss_of(self.eval_step, params, some, tokenizers.token_bytes(self.data.tokenizer), **kwargs)


def train(config: ConfigDict, workdir: Path, on_line: OnLine = lambda line: None) -> dict[str, Any]:
    """Trains the run that `config` describes in `workdir`, or goes on with it; returns its summary.

    Args:
      config: as gptjax.config.read gives it.
      workdir: absent, empty, or this config's own.
      on_line: gets each line of metrics.jsonl as it is written.

    Raises:
      ConfigError, DataError, CheckpointError: what the user can mend; nothing is written then.
      Diverged: the loss is not finite any more.
    """
    started = time.monotonic()
    config = configs.resolve(config)
    configs.check(config, jax.device_count())
    exists = run.check_free(workdir, config)
    if exists and report.read_summary(workdir):
        console.say(f"{workdir} is finished; to train anew, give another --workdir")
        return report.read_summary(workdir)
    job = make_job(config, workdir, started, exists)
    with run.lock(workdir), Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        state = begin(job, checkpoints)
        state = take_steps(job, state, checkpoints, on_line)
        checkpoints.wait()
        return finish(job, state)


def make_job(config: ConfigDict, workdir: Path, started: float, exists: bool) -> Job:
    """Reads the data, builds what trains on it, and makes the run directory where there is none."""
    tokenizer = tokenizers.load(workdir / "tokenizer") if exists else None
    loaded = data.load(config.data, tokenizer)
    config = configs.with_vocabulary(config, loaded.tokenizer.n_vocab)
    if exists:
        run.check_same_text(workdir, loaded.fingerprint)
    else:
        run.create(workdir, config, loaded.tokenizer, {"fingerprint": loaded.fingerprint})
    console.say(
        f"text       {config.data.path or config.data.source}: {len(loaded.train_N):,} tokens to train on, "
        f"{len(loaded.held_out_N):,} held out ({config.data.tokenizer})"
    )
    mesh = sharding.make_mesh(config.mesh.data)
    model = models.build(config.model, config.train.dtype)
    objective = OBJECTIVES[config.train.objective](model)
    shape = dict(context=config.data.context, batch_size=config.data.batch_size)
    return Job(
        config=config,
        workdir=workdir,
        started=started,
        spent=max([line["seconds"] for line in read_metrics(workdir)], default=0.0),
        data=loaded,
        mesh=mesh,
        model=model,
        objective=objective,
        optimizer=optimizer(config),
        eval_step=eval_step(objective, mesh),
        train_batches=batches.train_batches(loaded.train_N, **shape, seed=random.integer(config.seed, "batches")),
        eval_batches=batches.eval_batches(loaded.held_out_N, **shape),
    )


def begin(job: Job, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest checkpoint, or the first one, on the devices."""
    whole = sharding.replicated(job.mesh)

    def start() -> TrainState:
        return initial(job.model, job.optimizer, job.config.seed)

    if checkpoints.latest() is None:
        state = jax.jit(start, out_shardings=whole)()
    else:
        state = checkpoints.restore(shapes_on(jax.eval_shape(start), whole))
        console.say(f"resuming   at step {int(state.step):,} of {job.config.train.steps:,}")
    devices = f"{job.mesh.size} {jax.devices()[0].device_kind} device{'s' * (job.mesh.size > 1)}"
    arch, dtype = job.config.model.arch, job.config.train.dtype
    console.say(f"model      {arch}, {parameter_count(state.params):,} parameters, {dtype}, on {devices}")
    return state


def compiled_step(job: Job, state: TrainState) -> Step:
    """The train step, compiled for the run's shapes, so that no step's time holds the compiler's."""
    c = job.config
    step = train_step(
        job.objective, job.optimizer, job.mesh, c.seed, dropout=c.model.dropout > 0, slices=c.train.grad_accumulation
    )
    batch = sharding.place(job.train_batches[0], job.mesh)
    compiled = jitted(step, job.mesh).lower(state, batch).compile()
    console.say(f"compiled   {time.monotonic() - job.started:.1f} s after the start")
    return compiled


def take_steps(job: Job, state: TrainState, checkpoints: Checkpoints, on_line: OnLine) -> TrainState:
    """Every step from the state's to the last, with evaluations, checkpoints and metrics along the way."""
    c = job.config
    start, steps = int(state.step), c.train.steps
    if start == steps:
        return state
    step_fn = compiled_step(job, state)
    sample = [job.eval_batches[i] for i in batches.spread(job.eval_batches, c.eval.batches)]
    with (
        console.bar("training", steps, done=start) as advance,
        Recorder(job.workdir, c, state.params, start, job.seconds, advance, on_line) as recorder,
    ):
        for step in range(start + 1, steps + 1):
            state, values = step_fn(state, sharding.place(job.train_batches[step - 1], job.mesh))
            # The numbers of the step before are read while the devices work on this one.
            recorder.flush()
            recorder.push(step, values)
            evaluates = step % c.eval.every_steps == 0 or step == steps
            saves = step % c.checkpoint.every_steps == 0 or step == steps
            if evaluates or saves:
                recorder.flush(lambda: job.held_out_loss(state.params, sample) if evaluates else {})
            if saves:
                checkpoints.save(step, state)
                recorder.restart_clock()
    return state


def finish(job: Job, state: TrainState) -> dict[str, Any]:
    """Reads all held-out text, writes samples, plot and summary, and returns the summary."""
    c, text = job.config, job.data.held_out_text
    every = (job.eval_batches[i] for i in range(len(job.eval_batches)))
    with console.bar("held-out text", len(job.eval_batches)) as advance:
        quality = job.held_out_loss(state.params, every, advance=advance)
    summary = report.summarise(
        job.workdir, c, parameter_count(state.params), quality, held_out.compressors(text), job.seconds()
    )
    sample = decoding.generate(
        decoding.next_token(job.model),
        state.params,
        job.data.tokenizer,
        c.model.context,
        **c.sample,
        seed=c.seed,
    )
    report.write(job.workdir, summary, c.sample.prompt + sample.text)
    return summary
