"""Augmentation of small sets when they are read: random deletion, insertion, swap and replacement of tokens.

After EDA (arXiv 1901.11196), on tokens: inserted tokens are sampled from the set itself, where the paper uses
synonyms. The first and last id of a piece, which open and close it, never change.
"""

from typing import NamedTuple

import numpy as np

from gptjax.data.token_sets import TokenSet


class Augment(NamedTuple):
    """Probabilities, 0 to 1, of each edit, drawn independently for each token."""

    insert: float = 0.0  # another token is inserted after it
    delete: float = 0.0  # it is deleted
    swap: float = 0.0  # it is swapped with another token of the piece
    replace: float = 0.0  # it is replaced by another token

    def any(self) -> bool:
        """Returns True if any edit has a probability above 0."""
        return any(share > 0 for share in self)


def augment_tokens(ids: np.ndarray, augment: Augment, tokens: TokenSet, rng: np.random.Generator) -> np.ndarray:
    """Returns the ids with random edits; insertions and deletions change their number.

    Args:
      ids: int32, one or more.
      augment: probabilities of the edits.
      tokens: set that inserted tokens are sampled from.
      rng: random generator of all edits.
    """
    inner = ids[1:-1].copy()
    if not len(inner):
        return ids
    edits = rng.random((4, len(inner))) < np.array(augment)[:, None]
    insert, delete, swap, replace = edits
    others = rng.integers(len(inner), size=len(inner))
    for position in np.flatnonzero(swap):
        inner[position], inner[others[position]] = inner[others[position]], inner[position]
    inner[replace] = _sample_tokens(tokens, int(replace.sum()), rng)
    copies = (1 - delete.astype(int)) + insert
    at = np.repeat(np.arange(len(inner)), copies)
    grown = inner[at]
    new = np.flatnonzero(insert[at] & np.append(at[1:] != at[:-1], True))  # the last copy of a token with an insertion
    grown[new] = _sample_tokens(tokens, len(new), rng)
    return np.concatenate([ids[:1], grown, ids[-1:]]).astype(np.int32)


def _sample_tokens(tokens: TokenSet, count: int, rng: np.random.Generator) -> np.ndarray:
    sampled: list[int] = []
    while len(sampled) < count:
        position = int(rng.integers(len(tokens)))
        token = int(tokens.read(position, position + 1)[0])
        if token not in tokens.closing:
            sampled.append(token)
    return np.array(sampled, np.int32)
