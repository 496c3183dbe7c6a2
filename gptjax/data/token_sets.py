"""A token set: documents as one long stream of ids, in memory or on disk alike. Knows nothing of files and batches."""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.core import console
from gptjax.data.tokenizers.tokenizers import Tokenizer, encode


class Delimiters(NamedTuple):
    """The ids around documents: a record is `opening`, the text's ids, `ending`; `closing` follows the last record.

    Where a tokenizer has an end but no beginning, the end stands before each document, so that the first one is
    predicted from something; what ends a document is then the next one's opening.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    closing: tuple[int, ...]


def delimiters_of(tokenizer: Tokenizer) -> Delimiters:
    """Those of a tokenizer."""
    end = () if tokenizer.end is None else (tokenizer.end,)
    return Delimiters(tuple(tokenizer.begin), end, ()) if tokenizer.begin else Delimiters(end, (), end)


class Part(NamedTuple):
    """A piece of a stream that lies in one array."""

    tokens_N: np.ndarray  # ids, of any integer type
    ends_M: np.ndarray  # where each document's record ends in it, int64
    prompts_M: np.ndarray | None = None  # how many ids at the start of each record are a prompt, its opening included


class TokenSet:
    """Documents of token ids, one record after another.

    Args:
      parts: in order; arrays may be memory maps, and nothing of them is read before it is asked for.
      closing: ids that follow the last record, see `Delimiters`.
      name: for messages.
      arrays: what a batch gets besides, by its name there: `_BT` has a number for each id that is read, in the order
        of the stream and without the closing ones; any other an entry for each row.
      per_row: how many documents, one after another, are read as the choices of a row.
      repeated_prefix: ids that each piece of a document begins with, where it is cut: a tuned prompt.
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
        """Ids in the stream, the closing ones included."""
        return self._starts[-1]

    @property
    def documents(self) -> int:
        """How many there are."""
        return sum(len(part.ends_M) for part in self.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` to before `stop`, int32, at most up to the end of the stream."""
        first = bisect.bisect_right(self._starts, start) - 1
        pieces = []
        for part, begins in zip(self.parts[first:], self._starts[first:-1], strict=True):
            if begins >= stop:
                break
            pieces.append(part.tokens_N[max(start - begins, 0) : stop - begins])
        return (pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.zeros(0, np.int32)])).astype(np.int32)

    def read_ring(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start`, which may be past the end, of the stream joined to a ring."""
        start %= len(self)
        ids = self.read(start, start + count)
        while len(ids) < count:
            ids = np.concatenate([ids, self.read(0, count - len(ids))])
        return ids

    @property
    def has_head_targets(self) -> bool:
        """Whether a task head is asked, and no next tokens."""
        return bool(self.arrays.keys() - {"weights_BT"})

    def document_parts(self) -> list[Part]:
        """Those that it was made of, without what closes it."""
        return self.parts[: len(self.parts) - bool(self.closing)]

    def records(self) -> np.ndarray:
        """Where each document's record starts and ends in the stream, int64 [M, 2]."""
        ends_M = np.concatenate([start + part.ends_M for start, part in zip(self._starts, self.parts, strict=False)])
        return np.stack([np.concatenate([[0], ends_M])[:-1], ends_M], axis=1).astype(np.int64)

    def prompts(self) -> np.ndarray:
        """How many ids at the start of each record are a prompt, int64 [M]; 0 where the set knows of none."""
        lengths = [np.zeros(len(p.ends_M), int) if p.prompts_M is None else p.prompts_M for p in self.parts]
        return np.concatenate(lengths).astype(np.int64)


def concatenate(sets: Sequence[TokenSet], name: str) -> TokenSet:
    """All of them as one; they have the same closing."""
    closing = sets[0].closing
    parts = [part for token_set in sets for part in token_set.document_parts()]
    return TokenSet(parts, closing, name)


def from_texts(tokenizer: Tokenizer, texts: Sequence[str], label: str, name: str = "the text") -> TokenSet:
    """The texts as a token set in memory, with a progress bar of that label."""
    delimiters = delimiters_of(tokenizer)

    def pieces() -> Iterator[np.ndarray]:
        with console.bar(label, sum(map(len, texts))) as advance:
            for text in texts:
                yield np.array([*delimiters.prefix, *encode(tokenizer, text), *delimiters.suffix], np.int32)
                advance(len(text))

    documents = list(pieces())
    tokens_N = np.concatenate([*documents, np.zeros(0, np.int32)])
    ends_M = np.cumsum([len(d) for d in documents], dtype=np.int64)
    # Of an opening of several ids none is predicted.
    prompts_M = np.full(len(documents), len(delimiters.prefix)) if len(delimiters.prefix) > 1 else None
    repeated_prefix = delimiters.prefix if tokenizer.prompt else ()
    return TokenSet([Part(tokens_N, ends_M, prompts_M)], delimiters.closing, name, repeated_prefix=repeated_prefix)
