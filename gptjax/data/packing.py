"""Packing of documents into rows: no document is split needlessly, and few positions are empty.

Best-fit decreasing, after arXiv 2404.10830 section 3. Pure functions of lengths, and a cache of their results.
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
    """Pieces of documents in the order of rows; row r has the pieces `rows_R1[r]` to `rows_R1[r + 1] - 1`."""

    starts_P: np.ndarray  # start of each piece in the stream, int64
    lengths_P: np.ndarray  # number of its predictions, one less than its ids, int32
    rows_R1: np.ndarray  # int64

    def efficiency(self, context: int) -> float:
        """Returns the fraction of positions that are not padding."""
        return float(self.lengths_P.sum()) / ((len(self.rows_R1) - 1) * context)


def pieces(
    starts_M: np.ndarray, predictions_M: np.ndarray, context: int, prefix_length: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Splits documents that are longer than a row into full rows and a remainder.

    Args:
      starts_M: start of each document in the stream.
      predictions_M: number of its predictions; a document without any gives no piece.
      context: T, predictions per row.
      prefix_length: number of ids repeated before each piece but the first of a document, less than T; the length of a
        piece includes them.

    Returns:
      starts and lengths of the pieces, in the order of the documents. Each prediction is in exactly one piece.
    """
    fresh = context - prefix_length  # of every piece but the first
    counts_M = (predictions_M > 0) + np.maximum(-((context - predictions_M) // fresh), 0)
    document_P = np.repeat(np.arange(len(starts_M)), counts_M)
    first_P = np.concatenate([[0], np.cumsum(counts_M)])[document_P]
    number_P = np.arange(len(document_P)) - first_P
    offsets_P, added_P = number_P * fresh + prefix_length * (number_P > 0), prefix_length * (number_P > 0)
    return starts_M[document_P] + offsets_P, np.minimum(predictions_M[document_P] - offsets_P + added_P, context)


def best_fit(lengths_P: np.ndarray, context: int) -> np.ndarray:
    """Returns the row of each piece: longest first, each into the fullest row that it fits into (ties: the newest).

    Args:
      lengths_P: 1 to `context`.
      context: space of an empty row.
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
    """Packs the documents of a set into rows of `context` predictions.

    Raises:
      DataError: no document has a prediction.
    """
    records_M2 = tokens.records()
    # The end of a document is in its record, or is the prefix of the next one.
    predictions_M = records_M2[:, 1] - records_M2[:, 0] - (0 if tokens.closing else 1)
    starts_P, lengths_P = pieces(records_M2[:, 0], predictions_M, context, len(tokens.repeated_prefix))
    if not len(starts_P):
        raise DataError(f"{tokens.name} has no document of two tokens or more")
    row_P = best_fit(lengths_P, context)
    order = np.argsort(row_P, kind="stable")
    rows_R1 = np.searchsorted(row_P[order], np.arange(row_P.max() + 2))
    return Packing(starts_P[order], lengths_P[order].astype(np.int32), rows_R1)


def prompt_lengths(packing: Packing, tokens: TokenSet) -> tuple[np.ndarray, np.ndarray]:
    """Finds the continuations and the prompts among the pieces of a packing.

    Returns:
      bool [P], True for a piece that continues a document, and int64 [P], the number of its first predictions that have
      weight 0: those of a prompt, of `tokens.repeated_prefix` and of the id after it.
    """
    starts_M = tokens.records()[:, 0]
    record_P = np.searchsorted(starts_M, packing.starts_P, side="right") - 1
    offset_P = packing.starts_P - starts_M[record_P]
    ignored_P = np.maximum(tokens.prompts()[record_P] - 1 - offset_P, 0)
    return offset_P > 0, ignored_P + len(tokens.repeated_prefix) * (offset_P > 0)


def best_fit_pairs(lengths_P2: np.ndarray, context: int) -> np.ndarray:
    """Returns the row of each pair, where a row has space for `context` tokens on either side.

    Longest first (by the longer side), each into the row that leaves the least space on both sides together (ties: the
    row with the least on the first side, then the newest).

    Args:
      lengths_P2: tokens of source and target, 1 to `context`.
      context: space on either side of an empty row.
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
    """Returns the ids that complete the prompt of a record to a source, which ends as a document does."""
    if tokens.closing or not tokens.documents:
        return tokens.closing
    prompt, (start, stop) = int(tokens.prompts()[0]), tokens.records()[0]
    *_, before = tokens.read(start, start + prompt) if prompt else (None,)
    last = int(tokens.read(stop - 1, stop)[0])
    return () if before == last else (last,)


def pair_lengths(tokens: TokenSet) -> np.ndarray:
    """Returns the lengths of source (the prompt) and target of each record with their end tokens: int64 [M, 2].

    The closing ids of a set precede each record: they end the record before and are not part of its prompt.
    """
    records_M2, prompts_M = tokens.records(), tokens.prompts()
    sources_M = prompts_M - len(tokens.closing) + len(source_ending(tokens))
    return np.stack([sources_M, records_M2[:, 1] - records_M2[:, 0] - prompts_M + len(tokens.closing)], axis=1)


def pack_pairs(tokens: TokenSet, context: int) -> Packing:
    """Packs the pairs of a set into rows of `context` source and `context` target tokens; longer ones are truncated.

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
    """Computes `pack` once and stores the result in the cache directory of gptjax.

    Args:
      tokens: the set.
      context: T.
      fingerprint: fingerprint of the set, the key of the cache.
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
    except OSError as error:  # the cache only saves time
        console.say(f"warning    the packing cannot be kept: {error}")
