"""Masked language modelling: some tokens are hidden or changed, and the model says what they were."""

from collections.abc import Callable

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

MAX_SPAN_WORDS = 10  # words of a span; how many is drawn as arXiv 1907.10529 section 3.1 does
SPAN_LENGTH_PROBS = 0.2 * 0.8 ** np.arange(MAX_SPAN_WORDS)
SPAN_LENGTH_PROBS /= SPAN_LENGTH_PROBS.sum()

# Places in a row that are chosen together, and changed alike.
Group = np.ndarray


def choose_tokens(word_N: np.ndarray, places_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """`count` of the places, each for itself (arXiv 1810.04805)."""
    return [place for place in rng.permutation(places_N)[:count, None]]


def choose_words(word_N: np.ndarray, places_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """All places of words, at most `count` of them but for a single word; each place is changed for itself."""
    starts = np.flatnonzero(np.diff(word_N, prepend=-1))
    found: list[Group] = []
    for word in rng.permutation(len(starts)):
        stop = starts[word + 1] if word + 1 < len(starts) else len(places_N)
        if len(found) + stop - starts[word] <= count or not found:
            found += list(places_N[starts[word] : stop, None])
    return found


def choose_spans(word_N: np.ndarray, places_N: np.ndarray, count: int, rng: np.random.Generator) -> list[Group]:
    """`count` places in spans of one to ten words, fewer words being likelier (arXiv 1907.10529 section 3.1)."""
    free, found = np.ones(len(places_N), bool), []
    while count:
        (first,) = rng.choice(np.flatnonzero(free), 1)
        length = 1 + rng.choice(MAX_SPAN_WORDS, p=SPAN_LENGTH_PROBS)
        while first and free[first - 1] and word_N[first - 1] == word_N[first]:
            first -= 1
        stop = first
        while stop < len(free) and free[stop] and word_N[stop] < word_N[first] + length and stop - first < count:
            stop += 1
        free[first:stop] = False
        found.append(places_N[first:stop])
        count -= stop - first
    return found


MASKINGS: dict[str, Callable[[np.ndarray, np.ndarray, int, np.random.Generator], list[Group]]] = {
    "token": choose_tokens,
    "word": choose_words,
    "span": choose_spans,
}


def masked(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """The row with a share (`mask_rate`) of its text chosen, and these alone as targets (arXiv 1810.04805 section 3.1).

    Of what is chosen 80 % becomes the mask, 10 % another id of text, and 10 % stays. The inputs' own special ids are
    never chosen. `segments_BT` is 0 for padding.
    """
    ids, segments = row["inputs_BT"], rows.segment_ids(row)
    places_N = np.flatnonzero((segments > 0) & context.is_text_V[ids])
    inputs, weights = ids.copy(), np.zeros(len(ids), np.float32)
    if len(places_N):
        count = max(1, round(context.options.mask_rate * len(places_N)))
        # A word begins where its first id says so, and behind whatever is no text or is another text.
        apart_N = (np.diff(places_N, prepend=-2) > 1) | (np.diff(segments[places_N], prepend=0) != 0)
        word_N = np.cumsum(apart_N | context.begins_word_V[ids[places_N]])
        others = np.flatnonzero(context.is_text_V)
        for group in MASKINGS[context.options.masking](word_N, places_N, count, rng):
            weights[group] = 1
            drawn = rng.random()
            if drawn < 0.8:
                inputs[group] = context.specials["mask"]
            elif drawn < 0.9:
                inputs[group] = rng.choice(others, len(group))
    targets = np.where(weights > 0, ids, 0).astype(np.int32)
    return row | {"inputs_BT": inputs, "targets_BT": targets, "weights_BT": weights, "segments_BT": segments}
