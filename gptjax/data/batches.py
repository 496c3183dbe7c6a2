"""Batches: a flat stream of token ids in, arrays of a step out. A batch is a pure function of (seed, step).

Random access throughout (grain MapDataset): no position is ever saved, so resuming has nothing to get wrong.
"""

from typing import TypedDict

import grain
import numpy as np

from gptjax.config import DataError


class Batch(TypedDict):
    """One step's arrays: what the model reads, what it should say next, and how much each position counts."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray


def check_length(tokens_N: np.ndarray, context: int, what: str) -> None:
    """Raises DataError for a stream too short for one window."""
    if len(tokens_N) <= context:
        raise DataError(
            f"{what} has {len(tokens_N)} tokens, fewer than one window of {context} + 1: give more text, "
            "or a smaller --config.data.context"
        )


def train_batches(tokens_N: np.ndarray, context: int, batch_size: int, seed: int) -> grain.MapDataset:
    """An endless dataset whose element `step` is the Batch of that step.

    An epoch cuts the stream, taken as a ring, into windows that start at an offset of the epoch's own, and gives
    each once, shuffled.

    Args:
      tokens_N: the stream, more than `context` long.
      context: T, tokens per window.
      batch_size: B, windows per batch.
      seed: decides order and offsets.
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
    return order.map_with_index(window).batch(batch_size)


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
