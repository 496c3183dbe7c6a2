"""Processing of a chunk of documents by a worker: parse, clean, split by hash, encode. Pure functions."""

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

EXAMPLE_CHARACTERS = 160  # characters of a dropped document in the report


class Task(NamedTuple):
    """Configuration of the processing of documents."""

    reading: ReadOptions
    clean: tuple[str, ...]  # names of the cleaning steps in order, see gptjax.data.prepare.cleaning
    options: cleaning.CleaningOptions
    held_out: float  # fraction of documents held out for validation, by hash of their text


class Chunk(NamedTuple):
    """Raw documents, each with its file."""

    items: list[tuple[Path, Item]]


class Drop(NamedTuple):
    """Dropped document and the reason."""

    document: int  # index in its chunk
    step: int  # 0: reading; else 1 + index of the step in `Task.clean`
    reason: str
    example: str


class Outcome(NamedTuple):
    """Result for a chunk of M documents after S = 1 + len(Task.clean) steps, the first of which is reading."""

    records: Records
    held_out_M: np.ndarray
    sizes_MS: np.ndarray  # bytes of text after each step, int64; -1 from the step that dropped it
    changed_S: np.ndarray  # number of documents that each step changed
    read_bytes_M: np.ndarray  # bytes of text before any step
    signatures: dict[str, list[Any]]  # signature of each document that reached the step, by the name of the step
    drops: list[Drop]
    beginnings: list[str]  # first characters of each document as read

    def drop(self, document: int, step: int, reason: str) -> None:
        """Drops a document at a step before the one that dropped it, if any did."""
        self.sizes_MS[document, step:] = -1
        self.drops[:] = [drop for drop in self.drops if drop.document != document]
        self.drops.append(Drop(document, step, reason, self.beginnings[document]))


class Worker:
    """State of a task in one process.

    Args:
      task: configuration.
      tokenizer: tokenizer, or None if only texts are needed.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer | None) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.steps = {name: make(task.options) for name, make in cleaning.STEPS.items() if name in task.clean}
        self.signers = {name: make(task.options) for name, make in cleaning.SIGNATURES.items() if name in task.clean}

    def apply_steps(
        self, text: Text, after: list[int], changed: np.ndarray, signatures: dict[str, Any] | None
    ) -> Text | Dropped:
        """Applies all cleaning steps to a text.

        Args:
          text: text as read.
          after: list to which the size after reading and after each passed step is appended.
          changed: array whose entry of a step is incremented if the step changed the text.
          signatures: dictionary to which the signatures for deduplication are added, or None.
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
        """Processes a chunk."""
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
        """Encodes a document with its delimiters; returns its ids and the number of prompt ids."""
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
    """Returns True if a document is held out: the first 64 bits of SHA-256 of its text are below fraction * 2^64."""
    digest = hashlib.sha256(f"{text.prompt}\0{text.text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def clear_cache() -> None:
    """Clears the worker cached in this process, before another set is prepared."""
    _worker.cache_clear()


@cache
def _worker(task: Task, tokenizer: Path | None) -> Worker:
    return Worker(task, tokenizers.load(tokenizer) if tokenizer else None)


def process_chunk(task: Task, tokenizer: Path | None, chunk: Chunk) -> Outcome:
    """Processes a chunk with the worker cached in this process."""
    return _worker(task, tokenizer)(chunk)


def sample_texts(task: Task, tokenizer: Path | None, chunk: Chunk, share: float) -> list[str]:
    """Returns the cleaned texts of a fraction of the documents of a chunk, chosen by hash."""
    worker = _worker(task, tokenizer)
    texts = []
    for item in chunk.items:
        text = formats.parse(*item, task.reading)
        if is_held_out(text, share):
            result = worker.apply_steps(text, [], np.zeros(1 + len(task.clean), np.int64), None)
            if isinstance(result, Text):
                texts.append(result.prompt + result.text)
    return texts
