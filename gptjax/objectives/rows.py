"""What objectives' row functions share: which tokens of a row are real, and where its texts lie. NumPy, on the host."""

import itertools

import numpy as np

from gptjax.objectives.objective import Arrays, RowContext


def text_slices(row: Arrays) -> list[slice]:
    """Where the texts of a row lie in its inputs, each up to its last position that counts; padding lies in none.

    A row without segments is one text, and one without weights counts as a whole.
    """
    size = len(row["inputs_BT"])
    segments = row.get("segments_BT", np.ones(size, np.int32))
    counted = row.get("weights_BT", np.ones(size, np.float32)) > 0
    edges = np.flatnonzero(np.diff(segments, prepend=0, append=0))
    found = []
    for start, stop in itertools.pairwise(edges):
        last = np.flatnonzero(counted[start:stop])
        if segments[start] > 0 and len(last):
            found.append(slice(int(start), int(start + last[-1] + 1)))
    return found


def segment_ids(row: Arrays) -> np.ndarray:
    """The number of each token's text, 0 for padding, whether or not the row has segments."""
    found = np.zeros(len(row["inputs_BT"]), np.int32)
    for text in text_slices(row):
        found[text] = row["segments_BT"][text] if "segments_BT" in row else 1
    return found


def text_ids(row: Arrays, context: RowContext) -> np.ndarray:
    """The ids of a row that is one text, the last target included, without the special ones at either end."""
    found = text_slices(row)
    if not found:
        return np.zeros(0, np.int32)
    ids = np.append(row["inputs_BT"][found[0]], row["targets_BT"][found[0].stop - 1])
    inner = np.flatnonzero(context.is_text_V[ids])
    return ids[inner[0] : inner[-1] + 1] if len(inner) else ids[:0]


def pad(ids: np.ndarray, size: int) -> np.ndarray:
    """The ids, and zeros up to that size; int32."""
    return np.concatenate([ids, np.zeros(size - len(ids), np.int32)]).astype(np.int32)


def seq2seq_row(source: np.ndarray, target: np.ndarray, sizes: tuple[int, int], start: int) -> Arrays:
    """A row of an encoder-decoder that reads a source and says a target.

    Args:
      source, target: ids, the ending ones included; without a target nothing counts.
      sizes: S and T, not less than they have.
      start: what the decoder reads first.
    """
    S, T = sizes
    counted = np.arange(T) < len(target)
    return {
        "inputs_BT": pad(np.concatenate([[start], target[:-1]]) if len(target) else target, T),
        "targets_BT": pad(target, T),
        "weights_BT": counted.astype(np.float32),
        "segments_BT": counted.astype(np.int32),
        "source_BS": pad(source, S),
        "source_segments_BS": (np.arange(S) < len(source)).astype(np.int32),
    }
