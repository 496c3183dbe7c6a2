"""What rows are prepared with, made of a tokenizer and a set: which ids are text, where words begin, other texts."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from gptjax.data.token_sets import TokenSet
from gptjax.data.tokenizers.specials import SpecialIds
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.objectives.objective import Reading

SOME = 8  # ids by which two texts are told apart
TRIES = 20  # at another text than the one at hand, before the last one found is taken


def reading(tokenizer: Tokenizer, specials: SpecialIds, options: Any, tokens: TokenSet) -> Reading:
    """What rows of a set are prepared with.

    Args:
      tokenizer: of the set.
      specials: as gptjax.data.tokenizers.specials gives them.
      options: `config.objective`.
      tokens: the set.
    """
    texts = [b""] * max([specials.vocabulary, *(token + 1 for token in tokenizer.begin)])
    for token in range(tokenizer.n_vocab):
        if not tokenizer.is_special_token(token):
            with suppress(KeyError):
                texts[token] = tokenizer.decode_single_token_bytes(token)
    return Reading(
        specials=specials.ids,
        sentinels=specials.sentinels,
        begin=tuple(tokenizer.begin),
        end=tokenizer.end,
        is_text_V=np.array([bool(text) for text in texts]),
        begins_word_V=np.array([begins_word(text) for text in texts]),
        ends_sentence_V=np.array([ends_sentence(text) for text in texts]),
        elsewhere=elsewhere(tokens),
        options=options,
    )


def begins_word(text: bytes) -> bool:
    """Whether a token begins a word, which has the space before it; WordPiece marks those that do not by `##`."""
    return not text.startswith(b"##") and not (text[:1].isalnum() or text[:1] > b"\x7f")


def ends_sentence(text: bytes) -> bool:
    """Whether a token may be the last one of a sentence: it ends with a full stop, or there is a line's end in it."""
    return text.rstrip().endswith((b".", b"!", b"?")) or b"\n" in text


def elsewhere(tokens: TokenSet) -> Callable[[np.ndarray, int, np.random.Generator], np.ndarray]:
    """`(ids, count, rng)`: so many ids, at most, in a row of a text of the set that does not begin with `ids`.

    Of a set that has no other one it is another place of the same text.
    """
    records_M2 = tokens.records()

    def drawn(ids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        known = ids[:SOME]
        for _ in range(TRIES):
            start, stop = (int(at) for at in records_M2[rng.integers(len(records_M2))])
            if stop > start and not np.array_equal(tokens.read(start, min(start + len(known), stop)), known):
                break
        first = start + int(rng.integers(max(stop - start - count, 0) + 1))
        return tokens.read(first, min(first + count, stop))

    return drawn
