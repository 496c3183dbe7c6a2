"""Set-up of a training run, in four phases: `resolve`, `load`, `build` and `open_run`. Only the last one writes.

`resolve` checks the config, `load` reads all that the run reads before its first step, `build` makes model, objective,
optimizer and batches of it, and `open_run` creates the run's directory.
"""

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

from gptjax import data, models, objectives, optim, sharding
from gptjax.config.errors import ConfigError, UserError
from gptjax.core import console, rng
from gptjax.data import batches, chat, pairs
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode.prompts import check_source_ids, prompt_ids
from gptjax.decode.settings import SamplingParams
from gptjax.evals import held_out
from gptjax.finetune import methods, prompts, quantization
from gptjax.objectives.objective import Loss
from gptjax.runs import checkpoint_dir, pretrained
from gptjax.runs import config as configs
from gptjax.runs import directory as workdirs
from gptjax.runs.train_state import init_state
from gptjax.sharding import processes
from gptjax.training import ewc, memory, mesh_checks
from gptjax.training.ewc import FisherData
from gptjax.training.monitoring.goodput import Clock
from gptjax.training.teacher import TeacherFn, make_teacher_fn


def check(config: ConfigDict) -> None:
    """Raises ConfigError for the first problem of a resolved config that cannot be trained here."""
    kind = models.MODELS[config.model.arch].kind if config.model.arch in models.MODELS else ""
    more = itertools.chain(
        mesh_checks.problems(config, jax.device_count()),
        objectives.problems(config, kind),
        prompts.problems(config, kind),
    )
    configs.check(config, more)
    if config.finetune.quantise != "none":
        quantization.import_qwix(config.finetune.quantise)


# Keys of `config.model` that a run may override when its model was imported, or comes from another run.
IMPORT_OVERRIDES = ("dropout", "remat", "kernels")
PRETRAINED_OVERRIDES = (*IMPORT_OVERRIDES, "scan_layers", *workdirs.TASK_HEAD)


def resolve(config: ConfigDict, workdir: Path, origin: Path | None = None) -> ConfigDict:
    """Resolves and checks the config of a run; its model is that of the run at `origin`, if there is one.

    Raises:
      ConfigError: it cannot be trained here.
      DataError: a prepared set cannot be opened.
    """
    if origin:  # needed only to create the run, whose own config then has the model
        home = workdir if workdirs.is_run(workdir) else origin
        config = workdirs.with_model_of(home, config, PRETRAINED_OVERRIDES if origin != workdir else IMPORT_OVERRIDES)
    config = configs.resolve(config)
    check(config)
    memory.check_config(config)
    return config if origin else data.with_tokenizer_of_sets(config)


class Inputs(NamedTuple):
    """All that a run reads before its first step.

    Attributes:
      config: with its vocabulary.
      workdir: of the run.
      origin: the run whose tokenizer and parameters it starts from, or None.
      data: its text as token sets.
      tokenizer: as it is saved.
      resumes_at: step of the checkpoint to resume from; 0: a new run.
      mixings: stages of the data mixture, up to the last step.
      changes_mixture: True if the mixture changes at `resumes_at`.
    """

    config: ConfigDict
    workdir: Path
    origin: Path | None
    data: data.Data
    tokenizer: Tokenizer
    resumes_at: int
    mixings: list[batches.MixtureStage]
    changes_mixture: bool


def load(config: ConfigDict, workdir: Path, origin: Path | None = None, loaded: data.Data | None = None) -> Inputs:
    """Reads the text of a run, and its tokenizer and progress if there are any.

    Args:
      config: resolved and checked.
      workdir: free, or a run of the same config.
      origin: the run that it starts from.
      loaded: the data of `config.data`, if they are loaded already.

    Raises:
      ConfigError, DataError: text or a tokenizer that cannot be used.
      CheckpointError: all checkpoints of the run are damaged.
    """
    exists = workdirs.is_run(workdir)
    home = workdir if exists else origin
    prompts.check_raw(config)
    saved = tokenizers.load(home / "tokenizer") if home else None
    read = loaded or data.load(config.data, saved and prompts.with_prompt(saved, config))
    config = configs.with_vocabulary(config, objectives.special_ids(config, read.tokenizer).vocabulary)
    sampling_params(config, read.tokenizer)  # refuses a sample that cannot be drawn at the end
    resumes = exists and not workdirs.is_untrained(workdir)
    if resumes:
        workdirs.check_same_text(workdir, read.fingerprints)
    step = processes.broadcast(lambda: checkpoint_dir.newest_usable(workdir / "checkpoints") or 0) if resumes else 0
    earlier = workdirs.mixings(workdir) if resumes else []
    mixings = batches.change_mixture(earlier, step, read.shares)
    return Inputs(config, workdir, origin, read, saved or read.tokenizer, step, mixings, resumes and mixings != earlier)


class RunBatches(NamedTuple):
    """Batches of a run; `train[step - 1]` is the batch of a step."""

    stages: list[batches.Stage]
    train: batches.Batches
    held_out: batches.EvalBatches


class Parts(NamedTuple):
    """The parts of a run that compute.

    Attributes:
      mesh: the devices.
      model, objective, optimizer: of the config.
      eval_step: evaluates parameters on a batch.
      teacher_fn: adds the teacher's logits to a batch; the identity without a teacher.
    """

    mesh: Mesh
    model: nn.Module
    objective: Loss
    optimizer: optax.GradientTransformationExtraArgs
    eval_step: held_out.EvalStep
    teacher_fn: TeacherFn


def build(inputs: Inputs, members: int = 1) -> tuple[Parts, RunBatches]:
    """Builds the parts of a run and its batches.

    Args:
      inputs: from `load`.
      members: number of runs that are trained at once, of which this is the first.

    Raises:
      ConfigError: a step needs more memory than there is, a fine-tuning rule matches nothing, or the teacher does not
        fit.
      DataError: the held-out text has nothing to predict.
    """
    config, read = inputs.config, inputs.data
    mesh = sharding.make_mesh(**config.mesh)
    teacher_fn = make_teacher_fn(config, read.tokenizer, mesh)
    preprocess, stages = objectives.set_transform(config, read.tokenizer), batches.stages(config.data)
    share = batches.ProcessShard(*sharding.local_rows(mesh))
    rows = read.rows(config.data, rng.integer(batch_seed(config), "batches"), preprocess)
    train = batches.Batches(rows, stages, inputs.mixings, share, inputs.resumes_at)
    eval_batches = batches.EvalBatches(read.held_out_rows(config.data, preprocess), config.data.batch_size)
    model = methods.build_model(config, sharding.sharded_dimensions(mesh))
    check_memory(config, model, mesh.size, members)
    if inputs.origin and pretrained.is_partial(config):
        pretrained.partition_shapes(inputs.origin, config, models.shapes(model))  # refuses rules that match nothing
    objective = objectives.loss(config, model)
    eval_step = held_out.eval_step(config, objective, mesh)
    parts = Parts(mesh, model, objective, optim.optimizer(config), eval_step, teacher_fn)
    return parts, RunBatches(stages, train, eval_batches)


class TrainSetup(NamedTuple):
    """A run that is open for training: what does not change while it trains.

    Attributes:
      config: resolved, with its vocabulary.
      workdir: of the run.
      origin: the run whose parameters this one starts from, or None.
      clock: measures the run's wall time by kind.
      resumes_at: step of the checkpoint to resume from; 0: a new run.
      data: its text as token sets.
      parts: what computes.
      batches: of training and of held-out text.
      fisher_data: for elastic weight consolidation, in a new run with finetune.ewc.
      left_out: (first, last) steps whose batches are left out.
    """

    config: ConfigDict
    workdir: Path
    origin: Path | None
    clock: Clock
    resumes_at: int
    data: data.Data
    parts: Parts
    batches: RunBatches
    fisher_data: FisherData | None
    left_out: list[tuple[int, int]]

    def evaluate(self, params: Any, eval_batches: Iterable[Any], **kwargs: Any) -> dict[str, float]:
        """Evaluates parameters on batches of held-out text; see gptjax.evals.held_out.evaluate."""
        bytes_V, objective = tokenizers.token_bytes(self.data.tokenizer), self.config.train.objective
        return held_out.evaluate(self.parts.eval_step, params, eval_batches, objective, bytes_V, **kwargs)


def open_run(inputs: Inputs, parts: Parts, run_batches: RunBatches, started: float) -> TrainSetup:
    """Creates the run's directory, if there is none, or records what changes in it.

    An origin that was converted from a Hugging Face model is moved into the new directory.

    Args:
      inputs: from `load`.
      parts, run_batches: from `build`.
      started: time.monotonic() when the command started.

    Raises:
      ConfigError, DataError: the text of the origin, which finetune.ewc needs, cannot be used; nothing is written.
    """
    config, workdir, origin, step = inputs.config, inputs.workdir, inputs.origin, inputs.resumes_at
    needs_fisher = origin and config.finetune.ewc and not step
    fisher_data = ewc.fisher_data(config, origin, parts.mesh) if origin and needs_fisher else None
    facts = {"fingerprints": inputs.data.fingerprints, "mixings": inputs.mixings}
    processes.sync("all processes have read the run's directory")
    if not workdirs.is_run(workdir):
        fill = partial(fill_directory, config, origin, inputs.data.tokenizer)
        make = partial(workdirs.create, workdir, config, inputs.tokenizer, facts, fill)
        processes.run_on_first(make, "the run's directory is made")
    elif workdirs.is_untrained(workdir) or inputs.changes_mixture:
        begin = partial(workdirs.begin_training, workdir, config, facts)
        processes.run_on_first(begin, "the run's facts are written")
    if inputs.changes_mixture:
        console.say(f"mixture    changes after step {step:,}")
    return TrainSetup(
        config=config,
        workdir=workdir,
        origin=workdirs.origin(config, workdir),
        clock=Clock(started),
        resumes_at=step,
        data=inputs.data,
        parts=parts,
        batches=run_batches,
        fisher_data=fisher_data,
        left_out=workdirs.left_out(workdir),
    )


def train_setup(
    config: ConfigDict,
    workdir: Path,
    started: float,
    origin: Path | None = None,
    loaded: data.Data | None = None,
    members: int = 1,
) -> TrainSetup:
    """Sets up a run of a resolved and checked config; see `load`, `build` and `open_run`."""
    inputs = load(config, workdir, origin, loaded)
    setup = open_run(inputs, *build(inputs, members), started)
    if not loaded:
        log_data_summary(setup.config, setup.data)
    return setup


def check_memory(config: ConfigDict, model: nn.Module, devices: int, members: int = 1) -> None:
    """Raises ConfigError if a step needs more memory than there is.

    The shapes of the state are computed only if the lower bound is close to the limit, since they take a second for a
    model of many layers.

    Args:
      config: resolved, with its vocabulary.
      model: of the run.
      devices: number of devices in the mesh.
      members: number of runs that are trained at once.
    """
    needs = memory.lower_bound(config)
    devices = memory.device_count(config, members) if members > 1 else devices
    memory.check(needs, devices, members)
    if memory.is_close(needs, devices, members) and not config.init_from:
        shapes = jax.eval_shape(partial(init_state, model, optim.optimizer(config), config.seed))
        memory.check(memory.from_state(config, shapes), devices, members)


def batch_seed(config: ConfigDict) -> int:
    """Seed of the order of batches: data.seed, or the run's seed where that is None."""
    return int(config.seed if config.data.seed is None else config.data.seed)


def fill_directory(config: ConfigDict, origin: Path | None, tokenizer: Tokenizer, unfinished: Path) -> None:
    """Copies the files of the origin and the chat template into a new run directory that is being created."""
    if origin:
        workdirs.copy_original_tokenizer(origin, unfinished)
    if origin and configs.is_foreign(config.init_from):
        origin.rename(unfinished / workdirs.BASE)
    if config.data.examples.form == "chat":
        template = chat.get_template(config.data.examples.chat_template, tokenizer)
        (unfinished / workdirs.CHAT_TEMPLATE).write_text(template.text, encoding="utf-8")


def log_data_summary(config: ConfigDict, loaded: data.Data) -> None:
    """Logs the text of a run and its number of tokens."""
    names = " + ".join(f"{name} ({share})" for name, share in loaded.shares.items())
    text = config.data.path or (names if config.data.mixture else config.data.source)
    console.say(
        f"text       {text}: {loaded.tokens():,} tokens to train on, "
        f"{len(loaded.held_out):,} held out ({config.data.tokenizer})"
    )


def sampling_params(config: ConfigDict, tokenizer: Tokenizer) -> SamplingParams:
    """Returns the sampling parameters of the sample that a run draws at its end.

    Raises:
      ConfigError: an invalid `config.sample`, or a prompt that the tokenizer cannot encode.
    """
    settings = SamplingParams(config.sample.max_tokens, config.sample.temperature, config.sample.top_k)
    try:
        settings.check(config.model.vocabulary)
        if config.model.arch == "seq2seq":
            check_source_ids(pairs.source_ids(tokenizer, config.sample.prompt), config.model.context)
        else:
            prompt_ids(tokenizer, config.sample.prompt, 0)
    except UserError as error:
        raise ConfigError(f"the sample at the end cannot be drawn: {error}; change --config.sample") from error
    return settings
