"""Denoising: an encoder-decoder reads a corrupted text and predicts what was removed, or the whole text."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext


def denoising(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Returns the row's text as a corrupted source and a target, by `objective.corruption`.

    As in translation, source and target end with the id that ends documents, and the decoder begins with it.
    """
    return CORRUPTIONS[context.options.corruption](row, context, rng)


# T5's span corruption (arXiv 1910.10683 section 3.1.4)


def noise_lengths(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Returns the number of tokens of a text that are removed, and the number of spans; 0 if the text is too short."""
    if length < 2:
        return 0, 0
    removed = min(max(round(length * rate), 1), length - 1)
    return removed, min(max(round(removed / mean_span), 1), length - removed)


def source_and_target_length(length: int, options: Any) -> tuple[int, int]:
    """Returns the lengths of source and target of a text of `length` tokens, with sentinels and the ending id."""
    removed, spans = noise_lengths(length, options.mask_rate, options.mean_span)
    return length - removed + spans + 1, removed + spans + 2


def max_text_length(context: int, options: Any, around: int = 0) -> int:
    """Returns the most tokens whose source, with `around` more ids, and target fit into a context; 0 if none do."""
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
    """Returns the lengths of source and target of span corruption's rows, by the context."""
    return source_and_target_length(max_text_length(context, options), options)


def sentinel_count(context: int, options: Any) -> int:
    """Returns the number of sentinels that rows of a context need: one for each span, and one to close the target."""
    if options.corruption != "spans":
        return 0
    return noise_lengths(max_text_length(context, options), options.mask_rate, options.mean_span)[1] + 1


def random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Draws lengths of `parts` parts, each at least 1, that sum to `total`; all such partitions are equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def span_corruption(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Replaces each removed span by its own sentinel. The target has each sentinel followed by its span, and a last
    sentinel. Text and spans alternate, text first."""
    size, options, around = len(row["inputs_BT"]), context.options, len(context.begin)
    longest = max_text_length(size, options, around)
    text = rows.text_ids(row, context)[:longest]
    S, T = source_and_target_length(longest, options)
    removed, count = noise_lengths(len(text), options.mask_rate, options.mean_span)
    if not count:
        return rows.seq2seq_row(text[:0], text[:0], (S + around, T), _end(context))
    lengths = np.stack(
        [random_partition(len(text) - removed, count, rng), random_partition(removed, count, rng)], axis=1
    )
    pieces = np.split(text, np.cumsum(lengths)[:-1])
    source, target = list(context.begin), list[int]()
    for sentinel, visible, hidden in zip(context.sentinels, pieces[::2], pieces[1::2], strict=False):
        source += [*visible.tolist(), sentinel]
        target += [sentinel, *hidden.tolist()]
    end = _end(context)
    both = np.array([*source, end]), np.array([*target, context.sentinels[count], end])
    return rows.seq2seq_row(*both, sizes=(S + around, T), start=end)


# BART's text infilling (arXiv 1910.13461 section 2.2)


def text_infilling(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Replaces spans of Poisson lengths (mean `mean_span`) by one mask each; a span of length 0 inserts a mask. With
    `permute_sentences` the sentences are permuted first. The target is the whole text."""
    size, around = len(row["inputs_BT"]), len(context.begin) + 1
    text = rows.text_ids(row, context)[: size - around]
    if not len(text):
        return rows.seq2seq_row(text, text, (size, size), _end(context))
    end, options = _end(context), context.options
    permuted = permute(text, context.ends_sentence_V[text], rng) if options.permute_sentences else text
    mask, max_length = context.specials["mask"], size - around
    corrupted = mask_spans(permuted, mask, options.mask_rate, options.mean_span, max_length, rng)
    source, target = np.array([*context.begin, *corrupted, end]), np.append(text, end)
    return rows.seq2seq_row(source, target, (size, size), end)


def permute(ids: np.ndarray, is_last: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Permutes the sentences of a text; `is_last` is True where one ends."""
    sentences = np.split(ids, np.flatnonzero(is_last[:-1]) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def mask_spans(
    ids: np.ndarray, mask: int, rate: float, mean_span: float, max_length: int, rng: np.random.Generator
) -> np.ndarray:
    """Replaces spans that hold about `rate` of the ids by one mask each.

    Args:
      ids: ids of a text.
      mask: id of the mask.
      rate: share of the ids to replace; the last span is shortened to meet it.
      mean_span: mean of the Poisson distribution of span lengths.
      max_length: spans of length 0 insert masks only up to that many ids.
      rng: draws the spans.
    """
    remaining, lengths = round(rate * len(ids)), []
    while remaining > 0:
        lengths.append(min(int(rng.poisson(mean_span)), remaining))
        remaining -= lengths[-1]
    nonzero, insertions = [length for length in lengths if length], lengths.count(0)
    insertions = max(min(insertions, max_length - len(ids) + sum(nonzero) - len(nonzero)), 0)
    # Spans and the remaining tokens in any order; spans may touch.
    visible = len(ids) - sum(nonzero)
    parts = rng.permutation(np.array([1] * visible + [-length for length in nonzero] + [0] * insertions))
    corrupted, position = [], 0
    for part in parts.tolist():
        corrupted.append(int(ids[position]) if part == 1 else mask)
        position += abs(part)
    return np.array(corrupted, np.int32)


CORRUPTIONS: dict[str, Callable[[Arrays, RowContext, np.random.Generator], Arrays]] = {
    "spans": span_corruption,
    "infilling": text_infilling,
}


def _end(context: RowContext) -> int:
    assert context.end is not None, "gptjax.data.tokenizers.specials refuses a tokenizer without an end"
    return context.end
