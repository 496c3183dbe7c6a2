"""Helpers of row transforms: the texts of a row, its segments, and padding. NumPy, on the host."""

import itertools

import numpy as np

from gptjax.objectives.objective import Arrays, RowContext


def text_slices(row: Arrays) -> list[slice]:
    """Returns the slices of a row's inputs that are texts, each up to its last position of positive weight.

    A row without segments is one text. Without weights all of its positions count. Padding is in no slice.
    """
    size = len(row["inputs_BT"])
    segments = row.get("segments_BT", np.ones(size, np.int32))
    weighted = row.get("weights_BT", np.ones(size, np.float32)) > 0
    edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
    slices = []
    for start, stop in itertools.pairwise(edges):
        positions = np.flatnonzero(weighted[start:stop])
        if segments[start] > 0 and len(positions):
            slices.append(slice(int(start), int(start + positions[-1] + 1)))
    return slices


def segment_ids(row: Arrays) -> np.ndarray:
    """Returns the number of each token's text, 0 for padding, for rows with or without segments."""
    ids = np.zeros(len(row["inputs_BT"]), np.int32)
    for text in text_slices(row):
        ids[text] = row["segments_BT"][text] if "segments_BT" in row else 1
    return ids


def text_ids(row: Arrays, context: RowContext) -> np.ndarray:
    """Returns the ids of a row that is one text, with the last target, without special ids at either end."""
    slices = text_slices(row)
    if not slices:
        return np.zeros(0, np.int32)
    ids = np.append(row["inputs_BT"][slices[0]], row["targets_BT"][slices[0].stop - 1])
    inner = np.flatnonzero(context.is_text_V[ids])
    return ids[inner[0] : inner[-1] + 1] if len(inner) else ids[:0]


def pad(ids: np.ndarray, size: int) -> np.ndarray:
    """Pads ids with zeros to `size`; int32."""
    return np.concatenate([ids, np.zeros(size - len(ids), np.int32)]).astype(np.int32)


def seq2seq_row(source: np.ndarray, target: np.ndarray, sizes: tuple[int, int], start: int) -> Arrays:
    """Returns a row of an encoder-decoder.

    Args:
      source, target: ids, with the ending id; an empty target makes a row of weight 0.
      sizes: S and T, at least the lengths of source and target.
      start: id that the decoder begins with.
    """
    S, T = sizes
    real = np.arange(T) < len(target)
    return {
        "inputs_BT": pad(np.concatenate([[start], target[:-1]]) if len(target) else target, T),
        "targets_BT": pad(target, T),
        "weights_BT": real.astype(np.float32),
        "segments_BT": real.astype(np.int32),
        "source_BS": pad(source, S),
        "source_segments_BS": (np.arange(S) < len(source)).astype(np.int32),
    }
