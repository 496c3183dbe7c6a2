"""Packing: which pieces of documents share a row, so that none is cut needlessly and few positions are empty.

Best fit, longest first, after arXiv 2404.10830 section 3. Pure functions of lengths, and a store of what they give.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import console, runtime
from gptjax.data.token_sets import TokenSet


class Packing(NamedTuple):
    """Pieces of documents in the order of rows; row r has pieces `rows_R1[r]` to before `rows_R1[r + 1]`."""

    starts_P: np.ndarray  # where each piece starts in the stream, int64
    lengths_P: np.ndarray  # predictions that it holds, int32: one less than the ids it reads
    rows_R1: np.ndarray  # int64

    def efficiency(self, context: int) -> float:
        """The share of positions that predict something."""
        return float(self.lengths_P.sum()) / ((len(self.rows_R1) - 1) * context)


def pieces(
    starts_M: np.ndarray, predictions_M: np.ndarray, context: int, prefix_length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into pieces: only those that no row can hold, into full rows and what is left.

    Args:
      starts_M: where each document starts in the stream.
      predictions_M: how many predictions it gives; a document that gives none has no piece.
      context: T, predictions that a row holds.
      prefix_length: number of ids put before each piece but a document's first, less than T; its length counts them.

    Returns:
      starts and lengths of the pieces, in the documents' order. Each prediction is in one piece.
    """
    fresh = context - prefix_length  # of every piece but the first
    counts_M = (predictions_M > 0) + np.maximum(-((context - predictions_M) // fresh), 0)
    document_P = np.repeat(np.arange(len(starts_M)), counts_M)
    first_P = np.concatenate([[0], np.cumsum(counts_M)])[document_P]
    number_P = np.arange(len(document_P)) - first_P
    offsets_P, added_P = number_P * fresh + prefix_length * (number_P > 0), prefix_length * (number_P > 0)
    return starts_M[document_P] + offsets_P, np.minimum(predictions_M[document_P] - offsets_P + added_P, context)


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
    starts_P, lengths_P = pieces(records_M2[:, 0], predictions_M, context, len(tokens.repeated_prefix))
    if not len(starts_P):
        raise DataError(f"{tokens.name} has no document of two tokens or more")
    row_P = best_fit(lengths_P, context)
    order = np.argsort(row_P, kind="stable")
    rows_R1 = np.searchsorted(row_P[order], np.arange(row_P.max() + 2))
    return Packing(starts_P[order], lengths_P[order].astype(np.int32), rows_R1)


def prompt_lengths(packing: Packing, tokens: TokenSet) -> tuple[np.ndarray, np.ndarray]:
    """Of each piece of a set's packing: whether it goes on with a document, bool [P], and how many of its first
    predictions do not count: of a prompt, and of `tokens.repeated_prefix` and the id behind it; int64 [P]."""
    starts_M = tokens.records()[:, 0]
    record_P = np.searchsorted(starts_M, packing.starts_P, side="right") - 1
    offset_P = packing.starts_P - starts_M[record_P]
    ignored_P = np.maximum(tokens.prompts()[record_P] - 1 - offset_P, 0)
    return offset_P > 0, ignored_P + len(tokens.repeated_prefix) * (offset_P > 0)


def best_fit_pairs(lengths_P2: np.ndarray, context: int) -> np.ndarray:
    """The row of each pair, where a row has room for `context` tokens on either side, and both have to suffice.

    Longest first (by the longer side), each into the row in which the two sides have the least room left over together
    (ties: the one with the least on the first side, then the newest).

    Args:
      lengths_P2: tokens of source and target, 1 to `context`.
      context: room of either side of an empty row.
    """
    rows_by_room: dict[tuple[int, int], list[int]] = {}
    rooms = [0] * (context + 1)  # bit t of rooms[s] is set where some row has exactly s and t left
    row_P, used = np.empty(len(lengths_P2), np.int64), 0
    lengths = lengths_P2.tolist()
    for piece in np.lexsort((-lengths_P2.sum(1), -lengths_P2.max(1))).tolist():
        s, t = lengths[piece]
        best, space = 2 * context + 1, (context, context)
        for room in range(s, context + 1):
            if room - s >= best:
                break
            enough = rooms[room] >> t
            if enough:
                over = (enough & -enough).bit_length() - 1
                if room - s + over < best:
                    best, space = room - s + over, (room, t + over)
        if best <= 2 * context:
            row = rows_by_room[space].pop()
            if not rows_by_room[space]:
                rooms[space[0]] ^= 1 << space[1]
        else:
            row, used = used, used + 1
        row_P[piece] = row
        remaining = space[0] - s, space[1] - t
        if min(remaining) > 0:
            rooms[remaining[0]] |= 1 << remaining[1]
            rows_by_room.setdefault(remaining, []).append(row)
    return row_P


def source_ending(tokens: TokenSet) -> tuple[int, ...]:
    """The ids that belong behind a record's prompt to make it a source, which ends as a document does."""
    if tokens.closing or not tokens.documents:
        return tokens.closing
    prompt, (start, stop) = int(tokens.prompts()[0]), tokens.records()[0]
    *_, before = tokens.read(start, start + prompt) if prompt else (None,)
    last = int(tokens.read(stop - 1, stop)[0])
    return () if before == last else (last,)


def pair_lengths(tokens: TokenSet) -> np.ndarray:
    """Ids of each record's source, which is its prompt, and of its target, the end of both included: int64 [M, 2].

    Where a set has closing ids, these stand before each record: they end the one before and are no part of its prompt.
    """
    records_M2, prompts_M = tokens.records(), tokens.prompts()
    sources_M = prompts_M - len(tokens.closing) + len(source_ending(tokens))
    return np.stack([sources_M, records_M2[:, 1] - records_M2[:, 0] - prompts_M + len(tokens.closing)], axis=1)


def pack_pairs(tokens: TokenSet, context: int) -> Packing:
    """The packing of a set's pairs into rows of `context` source and `context` target tokens; the longer are cut.

    Raises:
      DataError: the set has no pairs.
    """
    lengths_M2 = pair_lengths(tokens)
    usable_P = np.flatnonzero((tokens.prompts() > 0) & (lengths_M2 > 1).all(1))
    if not len(usable_P):
        raise DataError(
            f"{tokens.name} has no pairs of a source (prompt) and a target; name the languages of parallel text "
            "(data.languages), or prepare with --prompt_key"
        )
    lengths_P2 = np.minimum(lengths_M2[usable_P], context)
    row_P = best_fit_pairs(lengths_P2, context)
    order = np.argsort(row_P, kind="stable")
    rows_R1 = np.searchsorted(row_P[order], np.arange(row_P.max() + 2))
    return Packing(tokens.records()[usable_P[order], 0], lengths_P2[order, 1].astype(np.int32), rows_R1)


def cached_packing(
    tokens: TokenSet, context: int, fingerprint: str, pack: Callable[[TokenSet, int], Packing] = pack
) -> Packing:
    """`pack`, computed once and kept in gptjax's cache.

    Args:
      tokens: the set.
      context: T.
      fingerprint: of the set; what was kept for it is taken as it is.
      pack: `pack` or `pack_pairs`.
    """
    identity = f"{fingerprint} {tokens.name} {len(tokens)} {context} {pack.__name__}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    path = runtime.cache_dir() / "packings" / f"{key}.npz"
    try:
        with np.load(path) as arrays:
            return Packing(*(arrays[name] for name in Packing._fields))
    except (OSError, ValueError, KeyError, EOFError):
        pass
    packing = pack(tokens, context)
    _save(path, packing)
    console.say(
        f"packed     {tokens.documents:,} documents into {len(packing.rows_R1) - 1:,} rows of {context:,}, "
        f"{packing.efficiency(context):.1%} full"
    )
    return packing


def _save(path: Path, packing: Packing) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **packing._asdict())
        Path(file.name).replace(path)
    except OSError as error:  # it is only kept to save time
        console.say(f"warning    the packing cannot be kept: {error}")
