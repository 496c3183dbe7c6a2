"""Fill in the middle: a decoder reads the text before and after a gap, and predicts the text in it."""

from typing import Any

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

EXTRA_IDS = 3  # number of ids that are added to a document: one before each of its parts


def fim(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Splits a share (`fim_rate`) of a row's documents at two places and rearranges the parts (arXiv 2207.14255 3).

    A document is the text between special ids; the part of a document that a window holds counts as a whole one. All
    tokens are predicted. Where a row has no room for the added ids, documents are truncated. Texts with a prompt stay
    as they are.
    """
    slices = rows.text_slices(row)
    size = len(row["inputs_BT"])
    room = size - sum(text.stop - text.start for text in slices)
    new = {name: np.zeros_like(row[name]) for name in row}
    start = 0
    for text in slices:
        ids, weights = np.append(row["inputs_BT"][text], row["targets_BT"][text.stop - 1]), row["weights_BT"][text]
        if weights.all():
            before = len(ids)
            ids = rearrange(ids, room, context, rng)
            room -= len(ids) - before
            weights = np.full(len(ids) - 1, weights[0])
        target = slice(start, start + len(ids) - 1)
        new["inputs_BT"][target], new["targets_BT"][target], new["weights_BT"][target] = ids[:-1], ids[1:], weights
        if "segments_BT" in row:
            new["segments_BT"][target] = row["segments_BT"][text.start]
        start = target.stop
    return new


def rearrange(ids: np.ndarray, room: int, context: RowContext, rng: np.random.Generator) -> np.ndarray:
    """Rearranges some of the documents between special ids; the result has at most `room` more ids."""
    edges = np.flatnonzero(np.diff(context.is_text_V[ids])) + 1
    new: list[np.ndarray] = []
    for part in np.split(ids, edges):
        excess = max(EXTRA_IDS - room, 0)
        if context.is_text_V[part[0]] and rng.random() < context.options.fim_rate and len(part) > excess:
            new.append(split_document(part[: len(part) - excess], context, rng))
            room -= EXTRA_IDS - excess
        else:
            new.append(part)
    return np.concatenate(new)


def split_document(ids: np.ndarray, context: RowContext, rng: np.random.Generator) -> np.ndarray:
    """Returns a document as prefix, suffix, middle; or, with probability `fim_spm`, as suffix, then prefix and middle
    joined (arXiv 2207.14255 section 3, SPM for joint training)."""
    first, second = np.sort(rng.integers(len(ids) + 1, size=2))
    prefix, middle, suffix = ids[:first], ids[first:second], ids[second:]
    before, after, gap = (np.array([context.specials[f"fim_{name}"]]) for name in ("prefix", "suffix", "middle"))
    if rng.random() < context.options.fim_spm:
        pieces: tuple[Any, ...] = (before, after, suffix, gap, prefix, middle)
    else:
        pieces = (before, prefix, after, suffix, gap, middle)
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
