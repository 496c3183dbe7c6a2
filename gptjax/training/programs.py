"""The programs of a run, compiled while its first state is made. No other file of training has threads."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import jax

from gptjax import console, optim, sharding
from gptjax.data import batches
from gptjax.decode import generate as decoding
from gptjax.training.checkpoints import shapes_on
from gptjax.training.job import Job
from gptjax.training.state import TrainState
from gptjax.training.step import Step, of_config


class Programs(NamedTuple):
    """What a run calls again and again, compiled or being compiled.

    Attributes:
      train_steps: by [B, T], one for each shape that lies ahead.
      eval_step: `(params, batch) -> summed loss` in nats.
      next_token: see gptjax.decode.generate.speaker.
    """

    train_steps: dict[tuple[int, int], "Future[Step]"]
    eval_step: "Future[Callable[..., jax.Array]]"
    next_token: "Future[decoding.NextToken]"


@contextmanager
def compiling(job: Job, like: TrainState, step: int) -> Iterator[Programs]:
    """Begins to compile what a run needs after `step`; what is not begun when the block ends is given up.

    Args:
      job: what runs.
      like: the state's shapes, with where each leaf lies.
      step: steps taken.
    """
    params = shapes_on(jax.eval_shape(optim.answering, like.opt_state, like.params), sharding.replicated(job.mesh))
    train_step = of_config(job.config, job.objective, job.optimizer, job.mesh)

    def for_stage(stage: batches.Stage) -> Step:
        start = time.monotonic()
        batch = sharding.place(job.train_batches[stage.start], job.mesh)
        program = train_step.lower(like, batch).compile()
        of_shape = f" for {stage.batch_size} x {stage.context} tokens" if len(job.stages) > 1 else ""
        console.say(f"compiled   in {time.monotonic() - start:.1f} s{of_shape}")
        return program

    shapes: dict[tuple[int, int], batches.Stage] = {}
    for stage in batches.stages_after(step, job.stages) if step < job.config.train.steps else ():
        shapes.setdefault((stage.batch_size, stage.context), stage)
    # One at a time: a compiler uses several cores by itself, and what trains comes first.
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compiler")
    try:
        yield Programs(
            train_steps={shape: pool.submit(for_stage, stage) for shape, stage in shapes.items()},
            eval_step=pool.submit(lambda: job.eval_step.lower(params, job.eval_batches[0]).compile()),
            next_token=pool.submit(decoding.compiled, job.model, params, job.sample_settings, job.sample_windows),
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
