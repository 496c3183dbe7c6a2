"""Options of a run that belong to no part of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import limits
from gptjax.config.options import option, section
from gptjax.data.options import DataOptions
from gptjax.finetune.options import FinetuneOptions
from gptjax.models.options import ModelOptions
from gptjax.objectives.options import ObjectiveOptions
from gptjax.optim.optimizers import OptimizerOptions
from gptjax.optim.schedules import ScheduleOptions
from gptjax.optim.skip_step import GuardOptions
from gptjax.runs.writers import WRITERS
from gptjax.sharding.options import MeshOptions

DTYPES = dict.fromkeys(("float32", "bfloat16"))


@dataclass(frozen=True)
class TrainOptions:
    """Training."""

    objective: str = option(
        "causal", "key of gptjax.objectives.OBJECTIVES, or a weighted sum: 'masked + 0.5*next_sentence'"
    )
    steps: int = option(1100, "optimizer steps", above=0)
    grad_accumulation: int = option(1, "slices of a batch whose gradients are accumulated before the update", above=0)
    hang_minutes: float = option(
        30.0,
        "minutes without progress after which the process exits, to be restarted; 0: never",
        most=1e7,
        resumes="always",
    )
    dtype: str = option("float32", "compute dtype; parameters are always float32", choices=DTYPES)


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation during training."""

    every_steps: int = option(110, "steps between evaluations on a fixed validation sample", above=0)
    batches: int = option(8, "batches in that sample; the end of a run evaluates all held-out text", above=0)


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints."""

    every_steps: int = option(275, "steps between checkpoints; 0: none by steps; the last step is always saved")
    every_minutes: float = option(0.0, "maximum minutes between checkpoints; 0: none by time", most=1e7)
    keep: int = option(2, "newest checkpoints kept", above=0)
    keep_every: int = option(0, "steps between checkpoints that are kept permanently; 0: none")
    keep_best: int = option(0, "checkpoints kept with the lowest validation loss; 0: none")


@dataclass(frozen=True)
class LogOptions:
    """Metrics and traces."""

    every_steps: int = option(10, "steps between lines of metrics.jsonl", above=0)
    statistics: int = option(0, "steps between norms of parameters and updates by group in metrics.jsonl; 0: none")
    writers: tuple[Any, ...] = option((), "additional writers, such as ('tensorboard',)", choices=WRITERS)
    profile_steps: tuple[Any, ...] = option(
        (), "first and last step to trace into the run's profile/, such as (10, 13); (): none"
    )


@dataclass(frozen=True)
class SampleOptions:
    """The sample at the end of a run."""

    prompt: str = option("def read(self", "prompt of the sample at the end of a run")
    max_tokens: int = option(200, "tokens to generate")
    temperature: float = option(0.8, "sampling temperature; 0: greedy")
    top_k: int = option(50, "sample among the k most likely tokens; 0: all")


@dataclass(frozen=True)
class RunOptions:
    """All keys of a run."""

    seed: int = option(
        0, "seed of every random stream of a run: parameters, batches, dropout, samples", most=limits.SEED, traced=True
    )
    init_from: str = option(
        "", "run directory, or hf:FOLDER or hf:NAME, to initialize model, parameters and tokenizer from"
    )
    model: ModelOptions = section(ModelOptions)
    data: DataOptions = section(DataOptions)
    finetune: FinetuneOptions = section(FinetuneOptions)
    optimizer: OptimizerOptions = section(OptimizerOptions)
    schedule: ScheduleOptions = section(ScheduleOptions)
    objective: ObjectiveOptions = section(ObjectiveOptions)
    train: TrainOptions = section(TrainOptions)
    mesh: MeshOptions = section(MeshOptions, resumes="always")
    eval: EvalOptions = section(EvalOptions, resumes="always")
    checkpoint: CheckpointOptions = section(CheckpointOptions, resumes="always")
    guard: GuardOptions = section(GuardOptions)
    log: LogOptions = section(LogOptions, resumes="always")
    sample: SampleOptions = section(SampleOptions, resumes="always")


def problems(config: ConfigDict) -> Iterator[str]:
    """Yields problems of these options with each other."""
    guard, log = config.guard, config.log
    if guard.spike_z and guard.warmup_steps < 2:
        yield f"guard.warmup_steps is {guard.warmup_steps}; detecting spikes (guard.spike_z) needs at least 2"
    yield from profile_problems(log.profile_steps, config.train.steps)
    if log.every_steps > 0 and log.statistics % log.every_steps:
        yield f"log.statistics={log.statistics} must be a multiple of log.every_steps={log.every_steps}"


def profile_problems(steps: tuple[Any, ...], last: int) -> Iterator[str]:
    """Yields problems of `log.profile_steps` in a run of `last` steps."""
    if not steps:
        return
    if len(steps) != 2 or any(type(step) is not int for step in steps):
        yield f"log.profile_steps is {steps}; it must be the first and the last step to trace, such as (10, 13), or ()"
    elif not 1 <= steps[0] <= steps[1] <= last:
        yield f"log.profile_steps is {steps}; it must be 1 <= first <= last <= train.steps={last}"
