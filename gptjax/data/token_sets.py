"""Token sets: documents as one long stream of ids, in memory or memory-mapped."""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.core import console
from gptjax.data.tokenizers.tokenizers import Tokenizer, encode


class Delimiters(NamedTuple):
    """Ids around documents: a record is `prefix`, the ids of the text, `suffix`; `closing` follows the last record.

    If a tokenizer has an end but no begin ids, the end precedes each document, so that its first token is predicted
    from something; the prefix of the next record then ends a document.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    closing: tuple[int, ...]


def delimiters_of(tokenizer: Tokenizer) -> Delimiters:
    """Returns the delimiters of a tokenizer."""
    end = () if tokenizer.end is None else (tokenizer.end,)
    return Delimiters(tuple(tokenizer.begin), end, ()) if tokenizer.begin else Delimiters(end, (), end)


class Part(NamedTuple):
    """Piece of a stream that is one array."""

    tokens_N: np.ndarray  # ids, of any integer type
    ends_M: np.ndarray  # end of the record of each document in it, int64
    prompts_M: np.ndarray | None = None  # ids at the start of each record that are a prompt, prefix included


class TokenSet:
    """Documents of token ids, one record after another.

    Args:
      parts: pieces of the stream in order; their arrays may be memory maps, of which only the requested ids are read.
      closing: ids that follow the last record, see `Delimiters`.
      name: name of the set, for messages.
      arrays: further arrays of a batch by name: `_BT` has an entry for each id of the stream but the closing ones, any
        other name has an entry for each row.
      choices_per_row: number of consecutive documents that are the choices of one row.
      repeated_prefix: ids that each piece of a split document begins with: a tuned prompt.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        closing: Sequence[int] = (),
        name: str = "the text",
        arrays: Mapping[str, np.ndarray] | None = None,
        choices_per_row: int = 1,
        repeated_prefix: Sequence[int] = (),
    ) -> None:
        self.name, self.closing, self.repeated_prefix = name, tuple(closing), tuple(repeated_prefix)
        self.arrays, self.choices_per_row = dict(arrays or {}), choices_per_row
        self.parts = [*parts, *([Part(np.array(closing, np.int32), np.zeros(0, np.int64))] if closing else [])]
        sizes = [len(part.tokens_N) for part in self.parts]
        self._starts = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        """Returns the number of ids in the stream, including the closing ones."""
        return self._starts[-1]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(len(part.ends_M) for part in self.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids from `start` to `stop` (exclusive), int32, at most up to the end of the stream."""
        first = bisect.bisect_right(self._starts, start) - 1
        pieces = []
        for part, begins in zip(self.parts[first:], self._starts[first:-1], strict=True):
            if begins >= stop:
                break
            pieces.append(part.tokens_N[max(start - begins, 0) : stop - begins])
        return (pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.zeros(0, np.int32)])).astype(np.int32)

    def read_ring(self, start: int, count: int) -> np.ndarray:
        """Returns `count` ids from `start`, which may be past the end, of the stream as a ring."""
        start %= len(self)
        ids = self.read(start, start + count)
        while len(ids) < count:
            ids = np.concatenate([ids, self.read(0, count - len(ids))])
        return ids

    @property
    def has_head_targets(self) -> bool:
        """True if targets are those of a task head instead of next tokens."""
        return bool(self.arrays.keys() - {"weights_BT"})

    def document_parts(self) -> list[Part]:
        """Returns the parts that the set was made of, without the closing ids."""
        return self.parts[: len(self.parts) - bool(self.closing)]

    def records(self) -> np.ndarray:
        """Returns start and end of the record of each document in the stream, int64 [M, 2]."""
        ends_M = np.concatenate([start + part.ends_M for start, part in zip(self._starts, self.parts, strict=False)])
        return np.stack([np.concatenate([[0], ends_M])[:-1], ends_M], axis=1).astype(np.int64)

    def prompts(self) -> np.ndarray:
        """Returns the number of prompt ids at the start of each record, int64 [M]; 0 without prompts."""
        lengths = [np.zeros(len(p.ends_M), int) if p.prompts_M is None else p.prompts_M for p in self.parts]
        return np.concatenate(lengths).astype(np.int64)


def concatenate(sets: Sequence[TokenSet], name: str) -> TokenSet:
    """Concatenates sets that have the same closing ids."""
    closing = sets[0].closing
    parts = [part for token_set in sets for part in token_set.document_parts()]
    return TokenSet(parts, closing, name)


def from_texts(tokenizer: Tokenizer, texts: Sequence[str], label: str, name: str = "the text") -> TokenSet:
    """Encodes texts as a token set in memory, showing a progress bar with that label."""
    delimiters = delimiters_of(tokenizer)

    def pieces() -> Iterator[np.ndarray]:
        with console.bar(label, sum(map(len, texts))) as advance:
            for text in texts:
                yield np.array([*delimiters.prefix, *encode(tokenizer, text), *delimiters.suffix], np.int32)
                advance(len(text))

    documents = list(pieces())
    tokens_N = np.concatenate([*documents, np.zeros(0, np.int32)])
    ends_M = np.cumsum([len(d) for d in documents], dtype=np.int64)
    # A prefix of several ids is not predicted.
    prompts_M = np.full(len(documents), len(delimiters.prefix)) if len(delimiters.prefix) > 1 else None
    repeated_prefix = delimiters.prefix if tokenizer.prompt else ()
    return TokenSet([Part(tokens_N, ends_M, prompts_M)], delimiters.closing, name, repeated_prefix=repeated_prefix)
