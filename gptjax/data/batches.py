"""Batches: a flat stream of token ids in, arrays of a step out. A batch is a pure function of (seed, step).

Random access throughout (grain MapDataset): no position is ever saved, so resuming has nothing to get wrong.
"""

from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np

from gptjax.config import DataError


class Batch(TypedDict):
    """One step's arrays: what the model reads, what it should say next, and how much each position counts."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray


class Stage(NamedTuple):
    """A stretch of training in which batches have one shape."""

    start: int  # steps taken before it
    batch_size: int  # B, windows per batch
    context: int  # T, tokens per window


def stages(config: Any) -> list[Stage]:
    """The stages of a run, the first one starting at 0: those of `config.stages`, then `config`'s own shape to the end.

    Args:
      config: `config.data`, resolved and checked.
    """
    found, start = [], 0
    for steps, batch_size, context in config.stages:
        found.append(Stage(start, batch_size, context))
        start += steps
    return [*found, Stage(start, config.batch_size, config.context)]


def stage_of(step: int, stages: list[Stage]) -> Stage:
    """The stage that a step, counted from 1, belongs to."""
    return next(stage for stage in reversed(stages) if stage.start < step)


def check_length(tokens_N: np.ndarray, context: int, what: str) -> None:
    """Raises DataError for a stream too short for one window."""
    if len(tokens_N) <= context:
        raise DataError(
            f"{what} has {len(tokens_N)} tokens, fewer than one window of {context} + 1: give more text, "
            "or a smaller --config.data.context"
        )


def train_batches(tokens_N: np.ndarray, context: int, batch_size: int, seed: int, skip: int = 0) -> grain.MapDataset:
    """An endless dataset whose element `step` is the Batch of that step.

    An epoch cuts the stream, taken as a ring, into windows that start at an offset of the epoch's own, and gives
    each once, shuffled.

    Args:
      tokens_N: the stream, more than `context` long.
      context: T, tokens per window.
      batch_size: B, windows per batch.
      seed: decides order and offsets.
      skip: windows left out, those of the first epoch's beginning first.
    """
    check_length(tokens_N, context, "the training text")
    windows = len(tokens_N) // context

    def window(index: int, k: int) -> Batch:
        epoch = index // windows
        offset = int(np.random.default_rng((seed, epoch)).integers(context))
        at = (offset + k * context + np.arange(context + 1)) % len(tokens_N)
        ids = tokens_N[at].astype(np.int32)
        return Batch(inputs_BT=ids[:-1], targets_BT=ids[1:], weights_BT=np.ones(context, np.float32))

    order = grain.MapDataset.range(windows).shuffle(seed=seed).repeat()
    return order.map_with_index(window)[skip:].batch(batch_size)


class StagedBatches:
    """`[step - 1]` is the Batch of that step, in the shape of its stage.

    Each stage reads the order of windows that a run of its context alone would read, from where as many tokens have
    been read as in the stages before it. So where only the batch size grows, each epoch still gives each window once.

    Args:
      tokens_N: the stream, longer than every context.
      stages: see `stages`.
      seed: decides order and offsets.
    """

    def __init__(self, tokens_N: np.ndarray, stages: list[Stage], seed: int) -> None:
        self.stages, self.batches, read = stages, {}, 0
        for stage, after in zip(stages, [*stages[1:], None], strict=True):
            skip = -(-read // stage.context)
            self.batches[stage] = train_batches(tokens_N, stage.context, stage.batch_size, seed, skip)
            read += (after.start - stage.start) * stage.batch_size * stage.context if after else 0

    def __getitem__(self, index: int) -> Batch:
        stage = stage_of(index + 1, self.stages)
        return self.batches[stage][index - stage.start]


def eval_batches(tokens_N: np.ndarray, context: int, batch_size: int) -> grain.MapDataset:
    """Batches that predict each token of the stream after its first exactly once, in order; the rest weighs 0."""
    check_length(tokens_N, 1, "the held-out text")
    targets = len(tokens_N) - 1
    rows = -(-targets // context)

    def row(k: int) -> Batch:
        ids = tokens_N[k * context : (k + 1) * context + 1].astype(np.int32)
        pad = context + 1 - len(ids)
        weights = np.concatenate([np.ones(context - pad, np.float32), np.zeros(pad, np.float32)])
        ids = np.pad(ids, (0, pad))
        return Batch(inputs_BT=ids[:-1], targets_BT=ids[1:], weights_BT=weights)

    blank = Batch(
        inputs_BT=np.zeros(context, np.int32),
        targets_BT=np.zeros(context, np.int32),
        weights_BT=np.zeros(context, np.float32),
    )
    whole = -(-rows // batch_size) * batch_size
    return grain.MapDataset.range(whole).map(lambda k: row(k) if k < rows else blank).batch(batch_size)


def spread(batches: grain.MapDataset, count: int) -> list[int]:
    """Indices of `count` of the batches, evenly spread, always the same; all of them where there are no more."""
    return sorted({round(i) for i in np.linspace(0, len(batches) - 1, min(count, len(batches)))})
