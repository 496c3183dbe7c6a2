"""Layouts: the rows that documents become. A row is a pure function of (set, context, seed, epoch, index).

All access is random (grain MapDataset): no reader position is saved, so resuming is exact.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import grain
import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import console
from gptjax.data.augment import Augment, augment_tokens
from gptjax.data.packing import cached_packing, pack_pairs, pair_lengths, prompt_lengths, source_ending
from gptjax.data.token_sets import TokenSet

# Below this number of rows a whole permutation is drawn: grain's shuffle, which stores none, takes 2^16 / count steps
# per row.
MAX_DRAWN_ORDER = 2**16


class Batch(TypedDict):
    """Arrays of one step, or of one row without B.

    Attributes:
      inputs_BT: ids that the model reads, int32.
      targets_BT: next ids to predict, int32.
      weights_BT: loss weight of each position, float32.
      segments_BT: number of the document in its row, from 1, and 0 for padding, int32; only where a row may hold
        several documents.
      source_BS, source_segments_BS: ids that the encoder reads, and the number of their pair in the row, int32; only of
        pairs.

    Rows for a task head have inputs_BT, segments_BT and the arrays of gptjax.data.task_formats, and no targets_BT.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    segments_BT: NotRequired[np.ndarray]
    source_BS: NotRequired[np.ndarray]
    source_segments_BS: NotRequired[np.ndarray]


class Rows(NamedTuple):
    """Rows that a layout makes of a set."""

    per_epoch: int  # number of rows in an epoch
    row: Callable[[int, int], Batch]  # (epoch, index in the epoch) -> row


def check_length(tokens: TokenSet, context: int) -> None:
    """Raises DataError if the stream is too short for one window."""
    if len(tokens) <= context:
        raise DataError(
            f"{tokens.name} has {len(tokens)} tokens, fewer than one window of {context} + 1: give more text, "
            "or a smaller --config.data.context"
        )


def pad(ids: np.ndarray, context: int, counts: np.ndarray | int = 1) -> Batch:
    """Returns a row that predicts the ids after the first with weights `counts`; padding has weight 0."""
    count = len(ids) - 1
    inputs, targets, weights = (np.zeros(context, dtype) for dtype in ("i4", "i4", "f4"))
    inputs[:count], targets[:count], weights[:count] = ids[:-1], ids[1:], counts
    return Batch(inputs_BT=inputs, targets_BT=targets, weights_BT=weights)


def flat(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Windows of the stream as a ring; each epoch gives every token once as an input, in another order.

    The windows of an epoch start at a random offset and follow each other; positions of the last one that the first
    one has already read have weight 0.
    """
    check_length(tokens, context)
    windows = -(-len(tokens) // context)

    @functools.lru_cache(maxsize=4)
    def offset(epoch: int) -> int:
        return int(np.random.default_rng((seed, epoch)).integers(context))

    def window(epoch: int, k: int) -> Batch:
        ids = tokens.read_ring(offset(epoch) + k * context, context + 1)
        fresh = min(len(tokens) - k * context, context)
        if augment.any():
            ids = augment_tokens(ids[: fresh + 1], augment, tokens, np.random.default_rng((seed, epoch, k)))[
                : fresh + 1
            ]
            return pad(ids, context)
        weights = np.ones(context, np.float32)
        weights[fresh:] = 0
        return Batch(inputs_BT=ids[:-1], targets_BT=ids[1:], weights_BT=weights)

    return Rows(windows, window)


def sequential(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Windows of the stream from its beginning; each token after the first is predicted once, padding has weight 0."""

    def window(epoch: int, k: int) -> Batch:
        return pad(tokens.read(k * context, (k + 1) * context + 1), context)

    return Rows(-(-(len(tokens) - 1) // context), window)


def packed(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Rows of whole documents that do not attend to each other; each epoch gives every document once.

    Only a document longer than a row is split, into full rows and a remainder. Prompts have weight 0.
    """
    packing, counts_N = cached_packing(tokens, context, fingerprint), loss_weights(tokens, augment)
    starts_P, lengths_P, rows_R1 = packing
    continues_P, ignored_P = prompt_lengths(packing, tokens)
    prefix = np.array(tokens.repeated_prefix, np.int32)

    def row(epoch: int, k: int) -> Batch:
        inputs, targets, weights, segments = (np.zeros(context, dtype) for dtype in ("i4", "i4", "f4", "i4"))
        offset = 0
        for number, piece in enumerate(range(rows_R1[k], rows_R1[k + 1]), 1):
            start, length, ignored = int(starts_P[piece]), int(lengths_P[piece]), int(ignored_P[piece])
            before = prefix if continues_P[piece] else prefix[:0]
            ids = np.concatenate([before, tokens.read(start, start + length - len(before) + 1)])
            if augment.any():
                rng = np.random.default_rng((seed, epoch, start))
                text = augment_tokens(ids[ignored:], augment, tokens, rng)
                ids = np.concatenate([ids[:ignored], text])[: length + 1]
            positions = slice(offset, offset + len(ids) - 1)
            counts = 1 if counts_N is None else counts_N[start : start + length]
            inputs[positions], targets[positions] = ids[:-1], ids[1:]
            weights[positions], segments[positions] = counts, number
            weights[offset : offset + ignored] = 0
            targets[offset : offset + min(ignored, len(prefix))] = 0  # ids outside the vocabulary of the head
            offset += length
        if augment.any():
            segments[:] = np.maximum.accumulate(
                segments
            )  # positions that a shortened document leaves empty belong to it
            segments[offset:] = 0
        return Batch(inputs_BT=inputs, targets_BT=targets, weights_BT=weights, segments_BT=segments)

    return Rows(len(rows_R1) - 1, row)


def examples(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Rows of one document each, padded or truncated; prompts have weight 0.

    Raises:
      DataError: prompts fill every row, so that there is nothing to predict.
    """
    if tokens.has_head_targets:
        return head_examples(tokens, context, seed, augment)
    records_M2, prompts_M, counts_N = tokens.records(), tokens.prompts(), loss_weights(tokens, augment)
    last = 1 if tokens.closing else 0  # the id after a record, which may be the prefix of the next one
    lengths_M = np.minimum(records_M2[:, 1] - records_M2[:, 0] + last, context + 1)
    usable = np.flatnonzero((lengths_M > 1) & (prompts_M < lengths_M))
    if not len(usable):
        raise DataError(f"{tokens.name}: no document has text after its prompt within {context} tokens (data.context)")

    def row(epoch: int, k: int) -> Batch:
        document = usable[k]
        start, prompt = int(records_M2[document, 0]), int(prompts_M[document])
        ids = tokens.read(start, start + int(lengths_M[document]))
        counts = 1 if counts_N is None else counts_N[start : start + len(ids) - 1]
        if augment.any():
            rng = np.random.default_rng((seed, epoch, start))
            text = augment_tokens(ids[max(prompt - 1, 0) :], augment, tokens, rng)
            ids = np.concatenate([ids[: max(prompt - 1, 0)], text])[: context + 1]
        batch = pad(ids, context, counts)
        batch["weights_BT"][: max(prompt - 1, 0)] = 0
        batch["targets_BT"][: max(min(prompt - 1, len(tokens.repeated_prefix)), 0)] = (
            0  # ids outside the vocabulary of the head
        )
        return batch

    return Rows(len(usable), row)


def loss_weights(tokens: TokenSet, augment: Augment) -> np.ndarray | None:
    """Returns the loss weight of the prediction made at each id of the stream, float32, or None if all are 1.

    Raises:
      DataError: augmentation would shift tokens against their weights.
    """
    weights = tokens.arrays.get("weights_BT")
    if weights is not None and augment.any():
        raise DataError(f"data.augment moves tokens, and {tokens.name} says of each what it is; leave it out")
    return weights


def head_examples(tokens: TokenSet, context: int, seed: int, augment: Augment) -> Rows:
    """Rows of texts for a task head, one text per row, or [C, T] for C choices; padding has segment 0.

    Raises:
      DataError: augmentation is requested for texts with a label per token.
    """
    records_M2, openings_M = tokens.records(), tokens.prompts()
    per_token = [name for name in tokens.arrays if name.endswith("_BT")]
    if augment.any() and (
        tokens.arrays.keys() & {"labels_BT", "spans_B2"} or tokens.arrays.get("types_BT", np.zeros(1)).any()
    ):
        raise DataError(f"data.augment moves tokens, and {tokens.name} says of each what it is; leave it out")

    def text(epoch: int, document: int) -> dict[str, np.ndarray]:
        start, stop = (int(at) for at in records_M2[document])
        ids = tokens.read(start, stop)[:context]
        if augment.any():
            rng, opening = np.random.default_rng((seed, epoch, start)), max(int(openings_M[document]) - 1, 0)
            text = augment_tokens(ids[opening:], augment, tokens, rng)
            ids = np.concatenate([ids[:opening], text])[:context]
        arrays = {"inputs_BT": np.zeros(context, "i4"), "segments_BT": np.zeros(context, "i4")}
        arrays["inputs_BT"][: len(ids)], arrays["segments_BT"][: len(ids)] = ids, 1
        for name in per_token:
            values = tokens.arrays[name][start : start + min(len(ids), stop - start)]
            arrays[name] = np.zeros(context, values.dtype)
            arrays[name][: len(values)] = values
        return arrays

    def row(epoch: int, k: int) -> Batch:
        texts = [text(epoch, k * tokens.choices_per_row + choice) for choice in range(tokens.choices_per_row)]
        batch = (
            texts[0]
            if tokens.choices_per_row == 1
            else {name: np.stack([example[name] for example in texts]) for name in texts[0]}
        )
        values = {name: np.asarray(tokens.arrays[name][k]) for name in tokens.arrays if name not in per_token}
        return cast(Batch, batch | values)

    return Rows(len(records_M2) // tokens.choices_per_row, row)


def pairs(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Rows of whole pairs of a source (the prompt of the record) and a target, as many as fit on both sides.

    A row has space for `context` source tokens and `context` target tokens. Each epoch gives every pair once, and pairs
    of equal lengths are permuted, so that other pairs share a row. A source that is too long is truncated before its
    end token; a target that is too long loses its end token too.
    """
    if augment.any():
        raise DataError("data.augment does nothing with data.layout=pairs; leave it out")
    starts_P, _, rows_R1 = cached_packing(tokens, context, fingerprint, pack_pairs)
    record_P = np.searchsorted(tokens.records()[:, 0], starts_P)
    prompts_P, lengths_P2, ending = tokens.prompts()[record_P], pair_lengths(tokens)[record_P], source_ending(tokens)
    cut = int((lengths_P2 > context).any(1).sum())
    if cut:
        summary = f"{cut:,} of {len(starts_P):,} of {tokens.name}"
        console.say(f"pairs      {summary} are longer than {context} tokens and are cut; data.context may be larger")
    slots_P = np.lexsort(np.minimum(lengths_P2, context).T)  # slots in rows, sorted by length

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        permuted_P = np.random.default_rng((seed, epoch)).permutation(len(slots_P))
        order_P = np.empty_like(slots_P)
        order_P[slots_P] = permuted_P[np.lexsort(np.minimum(lengths_P2[permuted_P], context).T)]
        return order_P

    def row(epoch: int, k: int) -> Batch:
        source, source_segments, inputs, targets, segments = (np.zeros(context, "i4") for _ in range(5))
        s = t = 0
        for number, pair in enumerate(order(epoch)[rows_R1[k] : rows_R1[k + 1]], 1):
            start, prompt = int(starts_P[pair]), int(prompts_P[pair])
            before = tokens.read(start + len(tokens.closing), start + prompt)
            after = tokens.read(start + prompt, start + prompt + int(lengths_P2[pair, 1]))
            ids, end = np.concatenate([before, np.array(ending, np.int32)]), after[-1]
            S, T = np.minimum(lengths_P2[pair], context)
            source[s : s + S], source[s + S - 1], source_segments[s : s + S] = ids[:S], ids[-1], number
            inputs[t], inputs[t + 1 : t + T] = end, after[: T - 1]
            targets[t : t + T], segments[t : t + T] = after[:T], number
            s, t = s + S, t + T
        weights = (segments > 0).astype(np.float32)
        return Batch(
            inputs_BT=inputs,
            targets_BT=targets,
            weights_BT=weights,
            segments_BT=segments,
            source_BS=source,
            source_segments_BS=source_segments,
        )

    return Rows(len(rows_R1) - 1, row)


def preprocess_rows(rows: Rows, preprocess: Callable[[Any, np.random.Generator], Any] | None, seed: int) -> Rows:
    """Applies `preprocess` to each row, with a random generator seeded by (seed, epoch, index of the row)."""
    if preprocess is None:
        return rows
    return Rows(
        rows.per_epoch, lambda epoch, k: preprocess(rows.row(epoch, k), np.random.default_rng((seed, epoch, k)))
    )


def shuffle_and_repeat(rows: Rows, seed: int) -> grain.MapDataset:
    """Repeats the rows endlessly, each epoch in another order."""
    return shuffled_indices(rows.per_epoch, seed).map_with_index(lambda index, k: rows.row(index // rows.per_epoch, k))


def shuffled_indices(count: int, seed: int) -> grain.MapDataset:
    """Repeats range(count) endlessly, each epoch in another order."""
    numbers = grain.MapDataset.range(count)
    if count >= MAX_DRAWN_ORDER:
        return numbers.shuffle(seed=seed % 2**32).repeat()

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch, count)).permutation(count)

    return numbers.repeat().map_with_index(lambda index, k: int(order(index // count)[k]))


Layout = Callable[[TokenSet, int, int, Augment, str], Rows]

LAYOUTS: dict[str, Layout] = {"flat": flat, "packed": packed, "examples": examples, "pairs": pairs}

# Layouts of held-out documents, by the layout of the run: each document once, in order.
EVAL_LAYOUTS: dict[str, Layout] = LAYOUTS | {"flat": sequential}
