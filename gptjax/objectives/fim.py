"""Fill in the middle: a decoder reads what is before and after a gap, and then says what is in it."""

from typing import Any

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

EXTRA_IDS = 3  # ids that a text gets: one before each of its parts


def fim(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """The row with a share (`fim_rate`) of its documents cut at two places and put together anew (arXiv 2207.14255 3).

    A document is what lies between special ids, in a window too, so that what a window holds of one is taken for a
    whole. All of it is predicted. Where a row has no room for the ids that are added, documents lose as many at their
    end. A text with a prompt stays as it is.
    """
    found = rows.text_slices(row)
    size = len(row["inputs_BT"])
    room = size - sum(text.stop - text.start for text in found)
    new = {name: np.zeros_like(row[name]) for name in row}
    at = 0
    for text in found:
        ids, weights = np.append(row["inputs_BT"][text], row["targets_BT"][text.stop - 1]), row["weights_BT"][text]
        if weights.all():
            before = len(ids)
            ids = rearrange(ids, room, context, rng)
            room -= len(ids) - before
            weights = np.full(len(ids) - 1, weights[0])
        here = slice(at, at + len(ids) - 1)
        new["inputs_BT"][here], new["targets_BT"][here], new["weights_BT"][here] = ids[:-1], ids[1:], weights
        if "segments_BT" in row:
            new["segments_BT"][here] = row["segments_BT"][text.start]
        at = here.stop
    return new


def rearrange(ids: np.ndarray, room: int, context: RowContext, rng: np.random.Generator) -> np.ndarray:
    """The ids of documents, between special ones, with some documents put together anew; `room` ids longer at most."""
    edges = np.flatnonzero(np.diff(context.is_text_V[ids])) + 1
    new: list[np.ndarray] = []
    for run in np.split(ids, edges):
        lost = max(EXTRA_IDS - room, 0)
        if context.is_text_V[run[0]] and rng.random() < context.options.fim_rate and len(run) > lost:
            new.append(split_document(run[: len(run) - lost], context, rng))
            room -= EXTRA_IDS - lost
        else:
            new.append(run)
    return np.concatenate(new)


def split_document(ids: np.ndarray, context: RowContext, rng: np.random.Generator) -> np.ndarray:
    """One document as prefix, suffix, middle; or, a share `fim_spm` of times, with the suffix first and prefix and
    middle in one (arXiv 2207.14255 section 3, its SPM for joint training)."""
    first, second = np.sort(rng.integers(len(ids) + 1, size=2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    before, after, gap = (np.array([context.specials[f"fim_{name}"]]) for name in ("prefix", "suffix", "middle"))
    if rng.random() < context.options.fim_spm:
        pieces: tuple[Any, ...] = (before, after, suffix, gap, prefix, middle)
    else:
        pieces = (before, prefix, after, suffix, gap, middle)
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
