"""Augmentation of small sets when they are read: tokens left out, put in, swapped and replaced at random.

After arXiv 1901.11196 (EDA), on tokens: what is put in is a token of the same set, as often as it has it, where the
paper takes synonyms. The first and last id of a piece, which open and close it, stay.
"""

from typing import NamedTuple

import numpy as np

from gptjax.data.token_sets import TokenSet


class Augment(NamedTuple):
    """Shares of a piece's tokens, 0 to 1; each token is drawn for itself."""

    insert: float = 0.0  # that get another one put behind them
    delete: float = 0.0  # that are left out
    swap: float = 0.0  # that change places with another one of the piece
    replace: float = 0.0  # that become another one

    def any(self) -> bool:
        """Whether anything is to be done."""
        return any(share > 0 for share in self)


def augment_tokens(ids: np.ndarray, augment: Augment, tokens: TokenSet, rng: np.random.Generator) -> np.ndarray:
    """The ids with edits drawn from `rng`; longer or shorter by what was put in and left out.

    Args:
      ids: int32, one or more.
      augment: how much of what.
      tokens: where tokens to put in come from.
      rng: decides all of it.
    """
    inner = ids[1:-1].copy()
    if not len(inner):
        return ids
    edits = rng.random((4, len(inner))) < np.array(augment)[:, None]
    insert, delete, swap, replace = edits
    others = rng.integers(len(inner), size=len(inner))
    for here in np.flatnonzero(swap):
        inner[here], inner[others[here]] = inner[others[here]], inner[here]
    inner[replace] = _sample_tokens(tokens, int(replace.sum()), rng)
    copies = (1 - delete.astype(int)) + insert
    at = np.repeat(np.arange(len(inner)), copies)
    grown = inner[at]
    new = np.flatnonzero(insert[at] & np.append(at[1:] != at[:-1], True))  # the last copy of where one is put in
    grown[new] = _sample_tokens(tokens, len(new), rng)
    return np.concatenate([ids[:1], grown, ids[-1:]]).astype(np.int32)


def _sample_tokens(tokens: TokenSet, count: int, rng: np.random.Generator) -> np.ndarray:
    sampled: list[int] = []
    while len(sampled) < count:
        place = int(rng.integers(len(tokens)))
        token = int(tokens.read(place, place + 1)[0])
        if token not in tokens.closing:
            sampled.append(token)
    return np.array(sampled, np.int32)
