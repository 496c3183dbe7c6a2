"""Masked language modelling: some tokens are masked or replaced, and the model predicts the original ones."""

from collections.abc import Callable

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

MAX_SPAN_WORDS = 10  # length of a span in words, drawn as in arXiv 1907.10529 section 3.1
SPAN_LENGTH_PROBS = 0.2 * 0.8 ** np.arange(MAX_SPAN_WORDS)
SPAN_LENGTH_PROBS /= SPAN_LENGTH_PROBS.sum()

# Positions in a row that are chosen and changed together.
Group = np.ndarray


def choose_tokens(word_N: np.ndarray, positions_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """Chooses `count` of the positions independently (arXiv 1810.04805)."""
    return [position for position in rng.permutation(positions_N)[:count, None]]


def choose_words(word_N: np.ndarray, positions_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """Chooses all positions of words, `count` at most unless it is a single word; each position is a group."""
    starts = np.flatnonzero(np.diff(word_N, prepend=-1))
    groups: list[Group] = []
    for word in rng.permutation(len(starts)):
        stop = starts[word + 1] if word + 1 < len(starts) else len(positions_N)
        if len(groups) + stop - starts[word] <= count or not groups:
            groups += list(positions_N[starts[word] : stop, None])
    return groups


def choose_spans(word_N: np.ndarray, positions_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """Chooses `count` positions in spans of one to ten words, short ones more likely (arXiv 1907.10529 section 3.1)."""
    free, groups = np.ones(len(positions_N), bool), []
    while count:
        (first,) = rng.choice(np.flatnonzero(free), 1)
        length = 1 + rng.choice(MAX_SPAN_WORDS, p=SPAN_LENGTH_PROBS)
        while first and free[first - 1] and word_N[first - 1] == word_N[first]:
            first -= 1
        stop = first
        while stop < len(free) and free[stop] and word_N[stop] < word_N[first] + length and stop - first < count:
            stop += 1
        free[first:stop] = False
        groups.append(positions_N[first:stop])
        count -= stop - first
    return groups


MASKINGS: dict[str, Callable[[np.ndarray, np.ndarray, int, np.random.Generator], list[Group]]] = {
    "token": choose_tokens,
    "word": choose_words,
    "span": choose_spans,
}


def masked(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Chooses a share (`mask_rate`) of a row's tokens, which alone are its targets (arXiv 1810.04805 section 3.1).

    Of the chosen tokens 80 % become the mask, 10 % a random id of text, and 10 % stay. Special ids in the inputs are
    never chosen. `segments_BT` is 0 for padding.
    """
    ids, segments = row["inputs_BT"], rows.segment_ids(row)
    positions_N = np.flatnonzero((segments > 0) & context.is_text_V[ids])
    inputs, weights = ids.copy(), np.zeros(len(ids), np.float32)
    if len(positions_N):
        count = max(1, round(context.options.mask_rate * len(positions_N)))
        # A word begins at an id that begins words, and after anything that is no text or is another text.
        boundary_N = (np.diff(positions_N, prepend=-2) > 1) | (np.diff(segments[positions_N], prepend=0) != 0)
        word_N = np.cumsum(boundary_N | context.begins_word_V[ids[positions_N]])
        text_ids = np.flatnonzero(context.is_text_V)
        for group in MASKINGS[context.options.masking](word_N, positions_N, count, rng):
            weights[group] = 1
            u = rng.random()
            if u < 0.8:
                inputs[group] = context.specials["mask"]
            elif u < 0.9:
                inputs[group] = rng.choice(text_ids, len(group))
    targets = np.where(weights > 0, ids, 0).astype(np.int32)
    return row | {"inputs_BT": inputs, "targets_BT": targets, "weights_BT": weights, "segments_BT": segments}
