"""Set-up of a training run from its config: data, mesh, model, objective, optimizer and run directory."""

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
from gptjax.decode.prompts import check_source_ids, prompt_ids
from gptjax.decode.settings import SamplingParams
from gptjax.evals import held_out
from gptjax.finetune import methods, prompts, quantization
from gptjax.objectives.objective import Loss
from gptjax.runs import checkpoint_dir, pretrained
from gptjax.runs import directory as workdirs
from gptjax.runs.train_state import init_state
from gptjax.sharding import processes
from gptjax.training import ewc, memory, mesh_checks
from gptjax.training.ewc import FisherData
from gptjax.training.monitoring.goodput import Clock
from gptjax.training.monitoring.writers import WRITERS
from gptjax.training.teacher import TeacherFn, make_teacher_fn

# The choices of each config key that has a fixed set of them.
CHOICES = (
    models.CHOICES
    | objectives.CHOICES
    | {
        "data.source": sources.SOURCES,
        "data.layout": layouts.LAYOUTS,
        "data.examples.form": {"": None} | task_formats.TASK_FORMATS,
        "log.writers": WRITERS,
        "finetune.method": methods.METHODS,
        "finetune.quantise": quantization.QUANTIZERS,
        "optimizer.name": optim.OPTIMIZERS,
        "schedule.name": optim.SCHEDULES,
    }
)


def check(config: ConfigDict) -> None:
    """Raises ConfigError for the first problem of a resolved config that cannot be trained here."""
    kind = models.MODELS[config.model.arch].kind if config.model.arch in models.MODELS else ""
    more = itertools.chain(
        mesh_checks.problems(config, jax.device_count()),
        objectives.problems(config, kind),
        prompts.problems(config, kind),
    )
    checks.check(config, CHOICES, more)
    if config.finetune.quantise != "none":
        quantization.import_qwix(config.finetune.quantise)


class TrainSetup(NamedTuple):
    """The parts of a run that do not change while it trains."""

    config: ConfigDict
    workdir: Path
    origin: Path | None  # the run whose parameters this one starts from
    clock: Clock  # measures the run's wall time by kind
    resumes_at: int  # step of the checkpoint to resume from; 0: a new run
    data: data.Data
    mesh: Mesh
    model: nn.Module
    objective: Loss
    optimizer: optax.GradientTransformationExtraArgs
    eval_step: held_out.EvalStep
    stages: list[batches.Stage]
    train_batches: batches.Batches
    eval_batches: batches.EvalBatches
    sampling_params: SamplingParams
    teacher_fn: TeacherFn  # adds the teacher's logits to a batch; the identity without a teacher
    fisher_data: FisherData | None  # for elastic weight consolidation, in a new run with finetune.ewc
    left_out: list[tuple[int, int]]  # (first, last) steps whose batches are left out

    def evaluate(self, params: Any, eval_batches: Iterable[Any], **kwargs: Any) -> dict[str, float]:
        """Evaluates parameters on batches of held-out text; see gptjax.evals.held_out.evaluate."""
        bytes_V, objective = tokenizers.token_bytes(self.data.tokenizer), self.config.train.objective
        return held_out.evaluate(self.eval_step, params, eval_batches, objective, bytes_V, **kwargs)


def train_setup(
    config: ConfigDict,
    workdir: Path,
    started: float,
    origin: Path | None = None,
    loaded: data.Data | None = None,
    members: int = 1,
) -> TrainSetup:
    """Loads the data, builds model, objective and optimizer, and creates the run directory if there is none.

    Args:
      config: resolved and checked.
      workdir: free, or a run of the same config.
      started: time.monotonic() when the command started.
      origin: the run whose tokenizer and parameters this one starts from; an origin converted from a Hugging Face
        model is moved into the new directory.
      loaded: the data of `config.data`, if it is loaded already.
      members: number of runs that are trained at once, of which this is the first.

    Raises:
      ConfigError, DataError: text or a tokenizer that cannot be used; nothing is written.
      CheckpointError: all checkpoints of the run are damaged.
    """
    exists = workdirs.is_run(workdir)
    home = workdir if exists else origin
    prompts.check_raw(config)
    saved_tokenizer = tokenizers.load(home / "tokenizer") if home else None
    is_loaded = loaded is not None
    loaded = loaded or data.load(config.data, saved_tokenizer and prompts.with_prompt(saved_tokenizer, config))
    config = configs.with_vocabulary(config, objectives.special_ids(config, loaded.tokenizer).vocabulary)
    prepare = objectives.set_transform(config, loaded.tokenizer)
    sampling_params = check_sample(config, loaded.tokenizer)
    resumes = exists and not workdirs.is_untrained(workdir)
    if resumes:
        workdirs.check_same_text(workdir, loaded.fingerprints)
    step = processes.broadcast(lambda: checkpoint_dir.newest_usable(workdir / "checkpoints") or 0) if resumes else 0
    old_mixings = workdirs.mixings(workdir) if resumes else []
    mixings, stages = batches.change_mixture(old_mixings, step, loaded.shares), batches.stages(config.data)
    mesh = sharding.make_mesh(**config.mesh)
    teacher_fn = make_teacher_fn(config, loaded.tokenizer, mesh)
    train_batches = batches.Batches(
        loaded.rows(config.data, rng.integer(batch_seed(config), "batches"), prepare),
        stages,
        mixings,
        batches.ProcessShard(*sharding.local_rows(mesh)),
        step,
    )
    eval_batches = batches.EvalBatches(loaded.held_out_rows(config.data, prepare), config.data.batch_size)
    facts = {"fingerprints": loaded.fingerprints, "mixings": mixings}
    model = methods.build_model(config, sharding.sharded_dimensions(mesh))
    check_memory(config, model, mesh.size, members)
    if origin and pretrained.is_partial(config):
        pretrained.partition_shapes(origin, config, models.shapes(model))  # refuses rules that match nothing
    fisher_data = ewc.fisher_data(config, origin, mesh) if origin and config.finetune.ewc and not step else None
    processes.sync("all processes have read the run's directory")
    if not exists:
        fill = partial(fill_directory, config, origin, loaded.tokenizer)
        make = partial(workdirs.create, workdir, config, saved_tokenizer or loaded.tokenizer, facts, fill)
        processes.run_on_first(make, "the run's directory is made")
    elif not resumes or mixings != old_mixings:
        begin = partial(workdirs.begin_training, workdir, config, facts)
        processes.run_on_first(begin, "the run's facts are written")
    if resumes and mixings != old_mixings:
        console.say(f"mixture    changes after step {step:,}")
    if not is_loaded:
        log_data_summary(config, loaded)
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
        sampling_params=sampling_params,
        teacher_fn=teacher_fn,
        fisher_data=fisher_data,
        left_out=workdirs.left_out(workdir),
    )


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


def check_sample(config: ConfigDict, tokenizer: Tokenizer) -> SamplingParams:
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
