"""Packing: which pieces of documents share a row, so that none is cut needlessly and few positions are empty.

Best fit, longest first, after arXiv 2404.10830 section 3. Pure functions of lengths, and a store of what they give.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax import console, runtime
from gptjax.config import DataError
from gptjax.data.token_sets import TokenSet


class Packing(NamedTuple):
    """Pieces of documents in the order of rows; row r has pieces `rows_R1[r]` to before `rows_R1[r + 1]`."""

    starts_P: np.ndarray  # where each piece starts in the stream, int64
    lengths_P: np.ndarray  # predictions that it holds, int32: one less than the ids it reads
    rows_R1: np.ndarray  # int64

    def efficiency(self, context: int) -> float:
        """The share of positions that predict something."""
        return float(self.lengths_P.sum()) / ((len(self.rows_R1) - 1) * context)


def pieces(starts_M: np.ndarray, predictions_M: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into pieces: only those that no row can hold, into full rows and what is left.

    Args:
      starts_M: where each document starts in the stream.
      predictions_M: how many predictions it gives; a document that gives none has no piece.
      context: T, predictions that a row holds.

    Returns:
      starts and lengths of the pieces, in the documents' order. Each prediction is in one piece.
    """
    counts_M = -(-predictions_M // context)
    document_P = np.repeat(np.arange(len(starts_M)), counts_M)
    first_P = np.concatenate([[0], np.cumsum(counts_M)])[document_P]
    offsets_P = (np.arange(len(document_P)) - first_P) * context
    return starts_M[document_P] + offsets_P, np.minimum(predictions_M[document_P] - offsets_P, context)


def best_fit(lengths_P: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece: longest first, each into the row with the least room that suffices (ties: the newest).

    Args:
      lengths_P: 1 to `context`.
      context: room of an empty row.
    """
    rows_by_room: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0  # bit r is set where some row has exactly r left
    row_P, used = np.empty(len(lengths_P), np.int64), 0
    lengths = lengths_P.tolist()
    for piece in np.argsort(-lengths_P, kind="stable").tolist():
        length = lengths[piece]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, used = context, used, used + 1
        row_P[piece] = row
        if room > length:
            if not rows_by_room[room - length]:
                rooms |= 1 << (room - length)
            rows_by_room[room - length].append(row)
    return row_P


def pack(tokens: TokenSet, context: int) -> Packing:
    """The packing of a set's documents into rows of `context` predictions.

    Raises:
      DataError: no document gives a prediction.
    """
    records_M2 = tokens.records()
    # What ends a document is in its record, or is the opening of the record that follows.
    predictions_M = records_M2[:, 1] - records_M2[:, 0] - (0 if tokens.closing else 1)
    starts_P, lengths_P = pieces(records_M2[:, 0], predictions_M, context)
    if not len(starts_P):
        raise DataError(f"{tokens.name} has no document of two tokens or more")
    row_P = best_fit(lengths_P, context)
    order = np.argsort(row_P, kind="stable")
    rows_R1 = np.searchsorted(row_P[order], np.arange(row_P.max() + 2))
    return Packing(starts_P[order], lengths_P[order].astype(np.int32), rows_R1)


def packing_of(tokens: TokenSet, context: int, fingerprint: str) -> Packing:
    """`pack`, computed once and kept in gptjax's cache.

    Args:
      tokens: the set.
      context: T.
      fingerprint: of the set; what was kept for it is taken as it is.
    """
    key = hashlib.sha256(f"{fingerprint} {tokens.name} {len(tokens)} {context}".encode()).hexdigest()[:32]
    kept = runtime.cache_dir() / "packings" / f"{key}.npz"
    try:
        with np.load(kept) as arrays:
            return Packing(*(arrays[name] for name in Packing._fields))
    except (OSError, ValueError, KeyError, EOFError):
        pass
    packing = pack(tokens, context)
    _keep(kept, packing)
    console.say(
        f"packed     {tokens.documents:,} documents into {len(packing.rows_R1) - 1:,} rows of {context:,}, "
        f"{packing.efficiency(context):.1%} full"
    )
    return packing


def _keep(path: Path, packing: Packing) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **packing._asdict())
        Path(file.name).replace(path)
    except OSError as error:  # it is only kept to save time
        console.say(f"warning    the packing cannot be kept: {error}")
