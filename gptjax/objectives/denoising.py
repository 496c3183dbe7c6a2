"""Denoising auto-encoders: an encoder-decoder reads a corrupted text and says what it was."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext


def denoising(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """The row's text as a corrupted source and what is to be said of it, by `corruption`.

    As of translation, the source ends with the id that ends documents, the target too, and the decoder begins with it.
    """
    return CORRUPTIONS[context.options.corruption](row, context, rng)


# T5's span corruption (arXiv 1910.10683 section 3.1.4)


def noise_lengths(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of so many tokens are left out, and in how many spans; 0 of a text too short for both."""
    if length < 2:
        return 0, 0
    left_out = min(max(round(length * rate), 1), length - 1)
    return left_out, min(max(round(left_out / mean_span), 1), length - left_out)


def source_and_target_length(length: int, options: Any) -> tuple[int, int]:
    """How many ids source and target of so many tokens have, sentinels and an ending one included."""
    left_out, spans = noise_lengths(length, options.mask_rate, options.mean_span)
    return length - left_out + spans + 1, left_out + spans + 2


def max_text_length(context: int, options: Any, around: int = 0) -> int:
    """The most tokens of a text whose source, with so many ids more, and target fit into a context; 0 where none do."""
    lengths = range(context, 0, -1)
    return next(
        (
            n
            for n in lengths
            if source_and_target_length(n, options)[0] + around <= context >= source_and_target_length(n, options)[1]
        ),
        0,
    )


def row_lengths(context: int, options: Any) -> tuple[int, int]:
    """How long source and target are of rows of a context, span corruption's."""
    return source_and_target_length(max_text_length(context, options), options)


def sentinel_count(context: int, options: Any) -> int:
    """How many different sentinels rows of a context need: one for each span, and one that closes the target."""
    if options.corruption != "spans":
        return 0
    return noise_lengths(max_text_length(context, options), options.mask_rate, options.mean_span)[1] + 1


def random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of so many parts, each at least 1, of a total; every way to cut it is as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def span_corruption(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Spans left out, each replaced by a sentinel of its own; the target has each sentinel and its span, and a last
    sentinel. Text and spans alternate, text first."""
    size, options, around = len(row["inputs_BT"]), context.options, len(context.begin)
    longest = max_text_length(size, options, around)
    text = rows.text_ids(row, context)[:longest]
    S, T = source_and_target_length(longest, options)
    left_out, count = noise_lengths(len(text), options.mask_rate, options.mean_span)
    if not count:
        return rows.seq2seq_row(text[:0], text[:0], (S + around, T), _end(context))
    lengths = np.stack(
        [random_partition(len(text) - left_out, count, rng), random_partition(left_out, count, rng)], axis=1
    )
    pieces = np.split(text, np.cumsum(lengths)[:-1])
    source, target = list(context.begin), list[int]()
    for name, kept, hidden in zip(context.sentinels, pieces[::2], pieces[1::2], strict=False):
        source += [*kept.tolist(), name]
        target += [name, *hidden.tolist()]
    end = _end(context)
    both = np.array([*source, end]), np.array([*target, context.sentinels[count], end])
    return rows.seq2seq_row(*both, sizes=(S + around, T), start=end)


# BART's text infilling (arXiv 1910.13461 section 2.2)


def text_infilling(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Spans of Poisson lengths (`mean_span`) replaced by one mask each, a span of length 0 being a mask put in; with
    `permute_sentences` the sentences change places first. The target is the whole text."""
    size, around = len(row["inputs_BT"]), len(context.begin) + 1
    text = rows.text_ids(row, context)[: size - around]
    if not len(text):
        return rows.seq2seq_row(text, text, (size, size), _end(context))
    end, options = _end(context), context.options
    given = permute(text, context.ends_sentence_V[text], rng) if options.permute_sentences else text
    mask, room = context.specials["mask"], size - around
    corrupted = mask_spans(given, mask, options.mask_rate, options.mean_span, room, rng)
    source, target = np.array([*context.begin, *corrupted, end]), np.append(text, end)
    return rows.seq2seq_row(source, target, (size, size), end)


def permute(ids: np.ndarray, is_last: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sentences of a text in another order; `is_last` is True where one ends."""
    sentences = np.split(ids, np.flatnonzero(is_last[:-1]) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def mask_spans(
    ids: np.ndarray, mask: int, rate: float, mean_span: float, room: int, rng: np.random.Generator
) -> np.ndarray:
    """The ids with about `rate` of them in spans that became one mask each.

    Args:
      ids: of a text.
      mask: the mask's id.
      rate: of the ids that are left out; the last span is cut to it.
      mean_span: of the Poisson distribution of spans' lengths.
      room: masks for spans of no length are put in only where no more than so many ids come of it.
      rng: decides all of it.
    """
    left, lengths = round(rate * len(ids)), []
    while left > 0:
        lengths.append(min(int(rng.poisson(mean_span)), left))
        left -= lengths[-1]
    real, none = [length for length in lengths if length], lengths.count(0)
    none = max(min(none, room - len(ids) + sum(real) - len(real)), 0)
    # Spans and the tokens that are kept, in any order; spans may touch.
    kept = len(ids) - sum(real)
    parts = rng.permutation(np.array([1] * kept + [-length for length in real] + [0] * none))
    found, at = [], 0
    for part in parts.tolist():
        found.append(int(ids[at]) if part == 1 else mask)
        at += abs(part)
    return np.array(found, np.int32)


CORRUPTIONS: dict[str, Callable[[Arrays, RowContext, np.random.Generator], Arrays]] = {
    "spans": span_corruption,
    "infilling": text_infilling,
}


def _end(context: RowContext) -> int:
    assert context.end is not None, "gptjax.data.tokenizers.specials refuses a tokenizer without an end"
    return context.end
