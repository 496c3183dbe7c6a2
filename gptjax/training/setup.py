"""What a run is made of, put together from its config before the first step: data, model, objective, optimizer."""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import data, models, objectives, optim, sharding
from gptjax.config import checks
from gptjax.config.errors import ConfigError, UserError
from gptjax.core import console, rng
from gptjax.data import batches, chat, layouts, pairs, sources, task_formats
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode.prompts import checked_source, prompt_ids
from gptjax.decode.settings import SamplingParams
from gptjax.evals import held_out
from gptjax.finetune import methods, prompts, quantised
from gptjax.objectives.objective import Loss
from gptjax.runs import checkpoint_dir, pretrained
from gptjax.runs import directory as workdirs
from gptjax.runs.train_state import initial
from gptjax.sharding import processes
from gptjax.training import ewc, memory, mesh_checks
from gptjax.training.ewc import Memory
from gptjax.training.monitoring.goodput import Clock
from gptjax.training.monitoring.writers import WRITERS
from gptjax.training.teacher import Teach, teaching

# What keys of a config choose among, by key.
CHOICES = (
    models.CHOICES
    | objectives.CHOICES
    | {
        "data.source": sources.SOURCES,
        "data.layout": layouts.LAYOUTS,
        "data.examples.form": {"": None} | task_formats.TASK_FORMATS,
        "log.writers": WRITERS,
        "finetune.method": methods.METHODS,
        "finetune.quantise": quantised.QUANTIZERS,
        "optimizer.name": optim.OPTIMIZERS,
        "schedule.name": optim.SCHEDULES,
    }
)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for the first thing that makes a config, resolved, one that cannot be trained here."""
    kind = models.MODELS[config.model.arch].kind if config.model.arch in models.MODELS else ""
    more = itertools.chain(
        mesh_checks.problems(config, jax.device_count()),
        objectives.problems(config, kind),
        prompts.problems(config, kind),
    )
    checks.check(config, CHOICES, more)
    if config.finetune.quantise != "none":
        quantised.library(config.finetune.quantise)


class TrainSetup(NamedTuple):
    """All that stays the same while a run trains."""

    config: ConfigDict
    workdir: Path
    origin: Path | None  # the run whose parameters this one begins with
    clock: Clock  # where the run's wall time goes
    resumes_at: int  # the step of the checkpoint that the run goes on from, 0 where it begins
    data: data.Data
    mesh: Mesh
    model: nn.Module
    objective: Loss
    optimizer: optax.GradientTransformationExtraArgs
    eval_step: held_out.EvalStep
    stages: list[batches.Stage]
    train_batches: batches.Batches
    eval_batches: batches.EvalBatches
    sample_settings: SamplingParams
    teach: Teach  # what a batch gets before a step, where there is a teacher
    memory: Memory | None  # what a run that begins is to remember, where it is asked to
    left_out: list[tuple[int, int]]  # first and last of the steps whose batches are not trained on

    def held_out_quality(self, params: Any, some: Iterable[Any], **kwargs: Any) -> dict[str, float]:
        """How well some batches of held-out text are done, as gptjax.evals.held_out.evaluate gives it."""
        bytes_V, objective = tokenizers.token_bytes(self.data.tokenizer), self.config.train.objective
        return held_out.evaluate(self.eval_step, params, some, objective, bytes_V, **kwargs)


def make_job(
    config: ConfigDict,
    workdir: Path,
    started: float,
    origin: Path | None = None,
    loaded: data.Data | None = None,
    members: int = 1,
) -> TrainSetup:
    """Reads the data, builds what trains on it, and makes the run directory where there is none.

    Args:
      config: resolved and checked.
      workdir: free, or this config's own.
      started: time.monotonic() when the command began.
      origin: the run whose tokenizer and parameters this one begins with; of a Hugging Face model it moves into the
        directory that is made.
      loaded: the data of these `config.data`, where they are read already.
      members: runs that are trained at once, of which this is the first.

    Raises:
      ConfigError, DataError: text or a tokenizer that cannot be used; nothing is written then.
      CheckpointError: all checkpoints of the run are damaged.
    """
    exists = workdirs.is_run(workdir)
    home = workdir if exists else origin
    prompts.check_raw(config)
    kept = tokenizers.load(home / "tokenizer") if home else None
    known_already = loaded is not None
    loaded = loaded or data.load(config.data, kept and prompts.seen(kept, config))
    config = configs.with_vocabulary(config, objectives.special_ids(config, loaded.tokenizer).vocabulary)
    prepare = objectives.preparing(config, loaded.tokenizer)
    sample_settings = check_sample(config, loaded.tokenizer)
    goes_on = exists and not workdirs.is_untrained(workdir)
    if goes_on:
        workdirs.check_same_text(workdir, loaded.fingerprints)
    step = processes.of_first(lambda: checkpoint_dir.newest_usable(workdir / "checkpoints") or 0) if goes_on else 0
    known = workdirs.mixings(workdir) if goes_on else []
    mixings, stages = batches.change_mixture(known, step, loaded.shares), batches.stages(config.data)
    mesh = sharding.make_mesh(**config.mesh)
    teach = teaching(config, loaded.tokenizer, mesh)
    train_batches = batches.Batches(
        loaded.rows(config.data, rng.integer(order_seed(config), "batches"), prepare),
        stages,
        mixings,
        batches.ProcessShard(*sharding.own_rows(mesh)),
        step,
    )
    eval_batches = batches.EvalBatches(loaded.held_out_rows(config.data, prepare), config.data.batch_size)
    facts = {"fingerprints": loaded.fingerprints, "mixings": mixings}
    model = methods.model_of(config, sharding.divided(mesh))
    check_memory(config, model, mesh.size, members)
    if origin and pretrained.is_part(config):
        pretrained.partition_shapes(origin, config, models.shapes(model))  # refuses rules that match nothing
    to_remember = ewc.memory(config, origin, mesh) if origin and config.finetune.ewc and not step else None
    processes.meet("all have looked at the run's directory")
    if not exists:
        fill = partial(begin_with, config, origin, loaded.tokenizer)
        make = partial(workdirs.create, workdir, config, kept or loaded.tokenizer, facts, fill)
        processes.first_does(make, "the run's directory is made")
    elif not goes_on or mixings != known:
        begin = partial(workdirs.begin_training, workdir, config, facts)
        processes.first_does(begin, "the run's facts are written")
    if goes_on and mixings != known:
        console.say(f"mixture    another one after step {step:,}")
    if not known_already:
        say_what_is_read(config, loaded)
    objective = objectives.loss(config, model)
    return TrainSetup(
        config=config,
        workdir=workdir,
        origin=workdirs.origin(config, workdir),
        clock=Clock(started),
        resumes_at=step,
        data=loaded,
        mesh=mesh,
        model=model,
        objective=objective,
        optimizer=optim.optimizer(config),
        eval_step=held_out.eval_step(config, objective, mesh),
        stages=stages,
        train_batches=train_batches,
        eval_batches=eval_batches,
        sample_settings=sample_settings,
        teach=teach,
        memory=to_remember,
        left_out=workdirs.left_out(workdir),
    )


def check_memory(config: ConfigDict, model: nn.Module, devices: int, members: int = 1) -> None:
    """Raises ConfigError where a step needs more memory than there is; `config`: with its vocabulary.

    Shapes of a state are made where they could matter alone, as that takes a second for a model of many layers.
    """
    needs = memory.least(config)
    devices = memory.devices_of(config, members) if members > 1 else devices
    memory.check(needs, devices, members)
    if memory.is_close(needs, devices, members) and not config.init_from:
        shapes = jax.eval_shape(partial(initial, model, optim.optimizer(config), config.seed))
        memory.check(memory.exact(config, shapes), devices, members)


def order_seed(config: ConfigDict) -> int:
    """Of the batches."""
    return int(config.seed if config.data.seed is None else config.data.seed)


def begin_with(config: ConfigDict, origin: Path | None, tokenizer: Tokenizer, unfinished: Path) -> None:
    """Puts into a run's new directory what it has of its origin, and the template of dialogues that it learns from."""
    if origin:
        workdirs.keep_original_tokenizer(origin, unfinished)
    if origin and configs.is_foreign(config.init_from):
        origin.rename(unfinished / workdirs.BASE)
    if config.data.examples.form == "chat":
        template = chat.get_template(config.data.examples.chat_template, tokenizer)
        (unfinished / workdirs.CHAT_TEMPLATE).write_text(template.text, encoding="utf-8")


def say_what_is_read(config: ConfigDict, loaded: data.Data) -> None:
    """Tells which text a run reads, and how much of it."""
    names = " + ".join(f"{name} ({share})" for name, share in loaded.shares.items())
    what = config.data.path or (names if config.data.mixture else config.data.source)
    console.say(
        f"text       {what}: {loaded.tokens():,} tokens to train on, "
        f"{len(loaded.held_out):,} held out ({config.data.tokenizer})"
    )


def check_sample(config: ConfigDict, tokenizer: Tokenizer) -> SamplingParams:
    """How the sample at a run's end is drawn.

    Raises:
      ConfigError: `config.sample` cannot be, or its prompt is not the tokenizer's; told now and not at the end.
    """
    settings = SamplingParams(config.sample.max_tokens, config.sample.temperature, config.sample.top_k)
    try:
        settings.check(config.model.vocabulary)
        if config.model.arch == "seq2seq":
            checked_source(pairs.source_ids(tokenizer, config.sample.prompt), config.model.context)
        else:
            prompt_ids(tokenizer, config.sample.prompt, 0)
    except UserError as error:
        raise ConfigError(f"the sample at the end cannot be drawn: {error}; change --config.sample") from error
    return settings
