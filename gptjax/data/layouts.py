"""Layouts: how documents become rows of a batch. A row is a pure function of (set, context, seed, epoch, its number).

Random access throughout (grain MapDataset): no position is ever saved, so resuming has nothing to get wrong.
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

# Of fewer rows an order is drawn as a whole: grain's shuffle, which holds none, needs 2^16 / count steps for a row.
MAX_DRAWN_ORDER = 2**16


class Batch(TypedDict):
    """One step's arrays, or one row's without B.

    Attributes:
      inputs_BT: what the model reads, int32.
      targets_BT: what it should say next, int32.
      weights_BT: how much each position counts, float32.
      segments_BT: which document of its row a position belongs to, 1, 2, ..., 0 for padding, int32; where rows hold
        several.
      source_BS, source_segments_BS: of pairs: what the encoder reads, and which pair of its row it is of, int32.

    Rows whose answers a task head gives have inputs_BT, segments_BT and these, see gptjax.data.task_formats; no
    targets_BT.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    segments_BT: NotRequired[np.ndarray]
    source_BS: NotRequired[np.ndarray]
    source_segments_BS: NotRequired[np.ndarray]


class Rows(NamedTuple):
    """What a layout makes of a set."""

    per_epoch: int  # how many rows an epoch has
    row: Callable[[int, int], Batch]  # the epoch, and which of its rows


def check_length(tokens: TokenSet, context: int) -> None:
    """Raises DataError for a stream too short for one window."""
    if len(tokens) <= context:
        raise DataError(
            f"{tokens.name} has {len(tokens)} tokens, fewer than one window of {context} + 1: give more text, "
            "or a smaller --config.data.context"
        )


def pad(ids: np.ndarray, context: int, counts: np.ndarray | int = 1) -> Batch:
    """A row that predicts each of the ids after the first, which weigh `counts`; the rest of it weighs 0."""
    count = len(ids) - 1
    inputs, targets, weights = (np.zeros(context, dtype) for dtype in ("i4", "i4", "f4"))
    inputs[:count], targets[:count], weights[:count] = ids[:-1], ids[1:], counts
    return Batch(inputs_BT=inputs, targets_BT=targets, weights_BT=weights)


def flat(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Windows of the stream, taken as a ring; each epoch gives every token once as an input, in another order.

    An epoch's windows start at an offset of its own, one after another; where the last would read what the first has
    read, it weighs 0.
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
    """Windows of the stream from its beginning; each token after the first is predicted once, and padding weighs 0."""

    def window(epoch: int, k: int) -> Batch:
        return pad(tokens.read(k * context, (k + 1) * context + 1), context)

    return Rows(-(-(len(tokens) - 1) // context), window)


def packed(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """Rows of whole documents that do not see each other; only a document longer than a row is cut, into rows of its
    own and what is left. Each epoch gives every document once. Prompts are read and weigh 0."""
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
            targets[offset : offset + min(ignored, len(prefix))] = 0  # ids that no head knows
            offset += length
        if augment.any():
            segments[:] = np.maximum.accumulate(segments)  # what a shortened document leaves is read with it
            segments[offset:] = 0
        return Batch(inputs_BT=inputs, targets_BT=targets, weights_BT=weights, segments_BT=segments)

    return Rows(len(rows_R1) - 1, row)


def examples(tokens: TokenSet, context: int, seed: int, augment: Augment, fingerprint: str) -> Rows:
    """A document a row, padded, or cut at its end where it is longer; prompts are read and weigh 0.

    Raises:
      DataError: prompts fill every row, so that nothing is left to learn from.
    """
    if tokens.has_head_targets:
        return head_examples(tokens, context, seed, augment)
    records_M2, prompts_M, counts_N = tokens.records(), tokens.prompts(), loss_weights(tokens, augment)
    last = 1 if tokens.closing else 0  # the id that closes a record, which may be the next one's opening
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
        batch["targets_BT"][: max(min(prompt - 1, len(tokens.repeated_prefix)), 0)] = 0  # ids that no head knows
        return batch

    return Rows(len(usable), row)


def loss_weights(tokens: TokenSet, augment: Augment) -> np.ndarray | None:
    """How much the prediction made at each id of the stream weighs, float32; None: each 1.

    Raises:
      DataError: they would move.
    """
    weights = tokens.arrays.get("weights_BT")
    if weights is not None and augment.any():
        raise DataError(f"data.augment moves tokens, and {tokens.name} says of each what it is; leave it out")
    return weights


def head_examples(tokens: TokenSet, context: int, seed: int, augment: Augment) -> Rows:
    """Texts whose answers a task head gives, one a row or as many as there are choices, [C, T], padded by segment 0.

    Raises:
      DataError: texts are to be augmented that have a label for each token.
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
    """Rows of whole pairs of a source, the record's prompt, and its target: as many as fit on both sides.

    A row has room for `context` tokens of sources and for `context` of targets. Each epoch gives every pair once; in
    each, pairs of the same two lengths change places, so that other pairs share a row. A source that is too long is cut
    before its end; of a target the end itself is cut off, since it is not what follows.
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
    slots_P = np.lexsort(np.minimum(lengths_P2, context).T)  # places in rows, by the lengths that they are for

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


def preprocess_rows(rows: Rows, prepare: Callable[[Any, np.random.Generator], Any] | None, seed: int) -> Rows:
    """The rows as an objective wants them: each with draws of its own, a function of the seed, epoch and its number."""
    if prepare is None:
        return rows
    return Rows(rows.per_epoch, lambda epoch, k: prepare(rows.row(epoch, k), np.random.default_rng((seed, epoch, k))))


def shuffle_and_repeat(rows: Rows, seed: int) -> grain.MapDataset:
    """Epoch after epoch of the rows, each in an order of its own."""
    return shuffled_indices(rows.per_epoch, seed).map_with_index(lambda index, k: rows.row(index // rows.per_epoch, k))


def shuffled_indices(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count`, epoch after epoch, each in an order of its own."""
    numbers = grain.MapDataset.range(count)
    if count >= MAX_DRAWN_ORDER:
        return numbers.shuffle(seed=seed % 2**32).repeat()

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch, count)).permutation(count)

    return numbers.repeat().map_with_index(lambda index, k: int(order(index // count)[k]))


Layout = Callable[[TokenSet, int, int, Augment, str], Rows]

LAYOUTS: dict[str, Layout] = {"flat": flat, "packed": packed, "examples": examples, "pairs": pairs}

# How held-out documents are read by a run of each layout: once, in order.
EVAL_LAYOUTS: dict[str, Layout] = LAYOUTS | {"flat": sequential}
