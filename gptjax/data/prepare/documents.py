"""What workers do with a chunk of documents: parse, clean, split by hash, encode. Pure, and the same in any process."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data import formats, token_sets
from gptjax.data.formats import ReadOptions, Text
from gptjax.data.prepare import cleaning
from gptjax.data.prepare.cleaning import Dropped
from gptjax.data.records import Item
from gptjax.data.shards import Records
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

EXAMPLE_CHARACTERS = 160  # characters of a dropped document that are shown


class Task(NamedTuple):
    """How a document becomes a record."""

    reading: ReadOptions
    clean: tuple[str, ...]  # steps by name, in order, see gptjax.data.prepare.cleaning
    options: cleaning.CleaningOptions
    held_out: float  # share of documents kept for validation, by hash of their text


class Chunk(NamedTuple):
    """Documents as they were read, each with its file."""

    items: list[tuple[Path, Item]]


class Drop(NamedTuple):
    """Why a document is not in the set."""

    document: int  # in its chunk
    step: int  # 0: reading; else 1 + the step's place in `Task.clean`
    reason: str
    example: str


class Outcome(NamedTuple):
    """A chunk's documents M after each of S = 1 + len(Task.clean) steps, the first one reading."""

    records: Records
    held_out_M: np.ndarray
    sizes_MS: np.ndarray  # bytes of text after each step, int64; -1 from where it was dropped on
    changed_S: np.ndarray  # documents that each step changed
    read_bytes_M: np.ndarray  # of text before any step
    signatures: dict[str, list[Any]]  # of each document where the step that wants it got it, by the step's name
    drops: list[Drop]
    beginnings: list[str]  # of each document's text as it was read

    def drop(self, document: int, step: int, reason: str) -> None:
        """Drops a document at an earlier step than it was dropped at, if it was."""
        self.sizes_MS[document, step:] = -1
        self.drops[:] = [drop for drop in self.drops if drop.document != document]
        self.drops.append(Drop(document, step, reason, self.beginnings[document]))


class Worker:
    """A task with what is needed for it in this process.

    Args:
      task: what to do.
      tokenizer: that encodes; None where only texts are wanted.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer | None) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.steps = {name: make(task.options) for name, make in cleaning.STEPS.items() if name in task.clean}
        self.signers = {name: make(task.options) for name, make in cleaning.SIGNATURES.items() if name in task.clean}

    def cleaned(
        self, text: Text, after: list[int], changed: np.ndarray, signatures: dict[str, Any] | None
    ) -> Text | Dropped:
        """The text through all steps.

        Args:
          text: as it was read.
          after: gets its size after reading and after each step that it passed.
          changed: 1 is added where a step changed it.
          signatures: gets those for duplicates, if they are wanted.
        """
        if not text.text.strip():
            return Dropped("empty")
        after.append(_bytes(text))
        for number, name in enumerate(self.task.clean, 1):
            if name in self.signers:
                if signatures is not None:
                    signatures[name] = self.signers[name](text.prompt + text.text)
                after.append(after[-1])
                continue
            step, joined_text = self.steps[name], text.prompt + text.text
            result = step(joined_text)  # a pair is judged as one text
            if isinstance(result, Dropped):
                return result
            if result != joined_text:
                text = Text(str(step(text.prompt)), str(step(text.text))) if text.prompt else Text("", result)
                changed[number] += 1
            if not text.text:
                return Dropped("nothing is left of it")
            after.append(after[-1] if result == joined_text else _bytes(text))
        return text

    def __call__(self, chunk: Chunk) -> Outcome:
        """All of it."""
        count, steps = len(chunk.items), 1 + len(self.task.clean)
        sizes_MS, changed_S = np.full((count, steps), -1, np.int64), np.zeros(steps, np.int64)
        read_bytes_M, held_out_M = np.zeros(count, np.int64), np.zeros(count, bool)
        signatures: dict[str, list[Any]] = {name: [None] * count for name in self.signers}
        lengths_M, prompts_M = np.zeros(count, np.int64), np.zeros(count, np.int64)
        pieces: list[np.ndarray] = []
        drops, beginnings = [], []
        for m, item in enumerate(chunk.items):
            text = formats.parse(*item, self.task.reading)
            beginnings.append((text.prompt + text.text)[:EXAMPLE_CHARACTERS])
            changed_S[0] += text.repaired
            read_bytes_M[m] = _bytes(text)
            after, new_signatures = list[int](), dict[str, Any]()
            result = self.apply_steps(text, after, changed_S, new_signatures)
            sizes_MS[m, : len(after)] = after
            for name, signature in new_signatures.items():
                signatures[name][m] = signature
            if isinstance(result, Dropped):
                drops.append(Drop(m, len(after), result.reason, beginnings[m]))
                continue
            held_out_M[m] = is_held_out(result, self.task.held_out)
            record, prompts_M[m] = self.record(result)
            lengths_M[m] = len(record)
            pieces.append(record)
        tokens_N = np.concatenate([*pieces, np.zeros(0, np.uint32)])
        records = Records(tokens_N, lengths_M, prompts_M, np.maximum(sizes_MS[:, -1], 0))
        return Outcome(records, held_out_M, sizes_MS, changed_S, read_bytes_M, signatures, drops, beginnings)

    def record(self, text: Text) -> tuple[np.ndarray, int]:
        """A document's ids with what stands around them, and how many of them are the prompt."""
        assert self.tokenizer is not None
        delimiters = token_sets.delimiters_of(self.tokenizer)
        prompt_ids = tokenizers.encode_array(self.tokenizer, text.prompt) if text.prompt else np.zeros(0, np.uint32)
        text_ids = tokenizers.encode_array(self.tokenizer, text.text)
        record = np.concatenate(
            [np.array(delimiters.prefix, np.uint32), prompt_ids, text_ids, np.array(delimiters.suffix, np.uint32)]
        )
        return record, len(delimiters.prefix) + len(prompt_ids)


def _bytes(text: Text) -> int:
    return len(text.prompt.encode()) + len(text.text.encode())


def is_held_out(text: Text, fraction: float) -> bool:
    """Whether a document is for validation: the SHA-256 of its text, as 64 bits, is below that fraction of 2^64."""
    digest = hashlib.sha256(f"{text.prompt}\0{text.text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def clear_cache() -> None:
    """Drops what this process keeps between chunks; for one that prepares several sets."""
    _worker.cache_clear()


@cache
def _worker(task: Task, tokenizer: Path | None) -> Worker:
    return Worker(task, tokenizers.load(tokenizer) if tokenizer else None)


def process_chunk(task: Task, tokenizer: Path | None, chunk: Chunk) -> Outcome:
    """A chunk's records, with account of each step."""
    return _worker(task, tokenizer)(chunk)


def sample_texts(task: Task, tokenizer: Path | None, chunk: Chunk, share: float) -> list[str]:
    """Cleaned texts of a share of a chunk's documents, chosen by hash."""
    worker = _worker(task, tokenizer)
    texts = []
    for item in chunk.items:
        text = formats.parse(*item, task.reading)
        if is_held_out(text, share):
            result = worker.apply_steps(text, [], np.zeros(1 + len(task.clean), np.int64), None)
            if isinstance(result, Text):
                texts.append(result.prompt + result.text)
    return texts
