"""Builds the RowContext of a tokenizer and a token set: which ids are text, where words begin, other texts."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from gptjax.data.token_sets import TokenSet
from gptjax.data.tokenizers.specials import SpecialIds
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.objectives.objective import RowContext

COMPARED_IDS = 8  # number of first ids by which two texts are compared
MAX_TRIES = 20  # draws of another text before the last one is taken, be it the same


def make_row_context(tokenizer: Tokenizer, specials: SpecialIds, options: Any, tokens: TokenSet) -> RowContext:
    """Builds the context that the row transforms of a token set read.

    Args:
      tokenizer: tokenizer of the set.
      specials: special ids, see gptjax.data.tokenizers.specials.
      options: `config.objective`.
      tokens: the token set.
    """
    texts = [b""] * max([specials.vocabulary, *(token + 1 for token in tokenizer.begin)])
    for token in range(tokenizer.n_vocab):
        if not tokenizer.is_special_token(token):
            with suppress(KeyError):
                texts[token] = tokenizer.decode_single_token_bytes(token)
    return RowContext(
        specials=specials.ids,
        sentinels=specials.sentinels,
        begin=tuple(tokenizer.begin),
        end=tokenizer.end,
        is_text_V=np.array([bool(text) for text in texts]),
        begins_word_V=np.array([begins_word(text) for text in texts]),
        ends_sentence_V=np.array([ends_sentence(text) for text in texts]),
        other_text=other_text(tokens),
        options=options,
    )


def begins_word(text: bytes) -> bool:
    """Returns True if a token begins a word: it has the space before it. WordPiece marks the others by `##`."""
    return not text.startswith(b"##") and not (text[:1].isalnum() or text[:1] > b"\x7f")


def ends_sentence(text: bytes) -> bool:
    """Returns True if a token may end a sentence: it ends with a full stop, or contains a newline."""
    return text.rstrip().endswith((b".", b"!", b"?")) or b"\n" in text


def other_text(tokens: TokenSet) -> Callable[[np.ndarray, int, np.random.Generator], np.ndarray]:
    """Returns `(ids, count, rng) -> ids`, which draws at most `count` consecutive ids of a text of the set.

    The text is one that does not begin with `ids`; if the set has no other, it is the same text.
    """
    records_M2 = tokens.records()

    def draw(ids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        first_ids = ids[:COMPARED_IDS]
        for _ in range(MAX_TRIES):
            start, stop = (int(bound) for bound in records_M2[rng.integers(len(records_M2))])
            if stop > start and not np.array_equal(tokens.read(start, min(start + len(first_ids), stop)), first_ids):
                break
        first = start + int(rng.integers(max(stop - start - count, 0) + 1))
        return tokens.read(first, min(first + count, stop))

    return draw
