"""Options of a run that belong to no part of it."""

from dataclasses import dataclass
from typing import Any

from gptjax.config.options import option, section


@dataclass(frozen=True)
class TrainOptions:
    """`config.train`: ."""

    objective: str = option(
        "causal",
        "key of gptjax.objectives.OBJECTIVES, or a weighted sum: \"masked + 0.5*next_sentence\"",
    )
    steps: int = option(1100, "optimizer steps", above=0)
    grad_accumulation: int = option(1, "slices of a batch whose gradients are accumulated before the update", above=0)
    hang_minutes: float = option(
        30.0,
        "minutes without progress after which the process exits, to be restarted; 0: never",
        most=10000000.0,
    )
    dtype: str = option("float32", "compute dtype, float32 or bfloat16; parameters are always float32")


@dataclass(frozen=True)
class EvalOptions:
    """`config.eval`: ."""

    every_steps: int = option(110, "steps between evaluations on a fixed validation sample", above=0)
    batches: int = option(8, "batches in that sample; the end of a run evaluates all held-out text", above=0)


@dataclass(frozen=True)
class CheckpointOptions:
    """`config.checkpoint`: ."""

    every_steps: int = option(275, "steps between checkpoints; 0: none by steps; the last step is always saved")
    every_minutes: float = option(0.0, "maximum minutes between checkpoints; 0: none by time", most=10000000.0)
    keep: int = option(2, "newest checkpoints kept", above=0)
    keep_every: int = option(0, "steps between checkpoints that are kept permanently; 0: none")
    keep_best: int = option(0, "checkpoints kept with the lowest validation loss; 0: none")


@dataclass(frozen=True)
class GuardOptions:
    """`config.guard`: skips the update of bad steps: a loss or gradient that is not finite, or a spike."""

    spike_z: float = option(
        0.0,
        "a loss or gradient norm this many standard deviations above its mean is a spike; 0: no detection",
    )
    warmup_steps: int = option(100, "steps before spikes are detected; the mean and deviation cover about 128 steps")
    patience: int = option(
        5,
        "consecutive bad steps before a run returns to a checkpoint; the second time it stops",
        above=0,
    )


@dataclass(frozen=True)
class LogOptions:
    """`config.log`: ."""

    every_steps: int = option(10, "steps between lines of metrics.jsonl", above=0)
    statistics: int = option(0, "steps between norms of parameters and updates by group in metrics.jsonl; 0: none")
    writers: tuple[Any, ...] = option((), "additional writers: \"tensorboard\", \"wandb\"")
    profile_steps: tuple[Any, ...] = option(
        (),
        "first and last step to trace into the run's profile/, such as (10, 13); (): none",
    )


@dataclass(frozen=True)
class SampleOptions:
    """`config.sample`: ."""

    prompt: str = option("def read(self", "prompt of the sample at the end of a run")
    max_tokens: int = option(200, "tokens to generate")
    temperature: float = option(0.8, "sampling temperature; 0: greedy")
    top_k: int = option(50, "sample among the k most likely tokens; 0: all")


@dataclass(frozen=True)
class RunOptions:
    """`config`: all sections of a run."""

    seed: int = option(
        0,
        "seed of every random stream of a run: parameters, batches, dropout, samples",
        most=4294967295,
    )
    init_from: str = option(
        "",
        "run directory, or hf:FOLDER or hf:NAME, to initialize model, parameters and tokenizer from",
    )
    model: ModelOptions = section(ModelOptions)
    data: DataOptions = section(DataOptions)
    finetune: FinetuneOptions = section(FinetuneOptions, "fine-tuning of the model in init_from")
    optimizer: OptimizerOptions = section(OptimizerOptions)
    schedule: ScheduleOptions = section(ScheduleOptions)
    objective: ObjectiveOptions = section(ObjectiveOptions, "options of the objectives named in train.objective")
    train: TrainOptions = section(TrainOptions)
    mesh: MeshOptions = section(MeshOptions, "Devices along each axis; one of them may be -1: all that the other axes leave.")
    eval: EvalOptions = section(EvalOptions)
    checkpoint: CheckpointOptions = section(CheckpointOptions)
    guard: GuardOptions = section(GuardOptions, "skips the update of bad steps: a loss or gradient that is not finite, or a spike")
    log: LogOptions = section(LogOptions)
    sample: SampleOptions = section(SampleOptions)
