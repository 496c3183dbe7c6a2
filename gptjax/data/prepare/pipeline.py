"""Prepares a token set from files: documents are read, cleaned, split and encoded by all cores, and written in order.

One process reads files into chunks of documents and writes the results; workers do the rest, which is a pure function
of a chunk. Only deduplication depends on earlier documents; the writing process does it, in order. So the set does not
depend on the number of workers, nor on interruptions of the preparation.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console, schema
from gptjax.core.files import read_json, write_atomic
from gptjax.data import formats, shards, token_sets
from gptjax.data.prepare import cleaning, dedup, documents
from gptjax.data.prepare.documents import Chunk, Outcome, Task, process_chunk, sample_texts
from gptjax.data.prepare.report import Report
from gptjax.data.prepare.workers import Workers
from gptjax.data.records import Item
from gptjax.data.sources import files_below, files_matching
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

CHUNK_BYTES = 2**20  # bytes of documents per chunk


class Settings(NamedTuple):
    """Settings of a preparation; the same settings and files always give the same set."""

    inputs: tuple[str, ...]  # files, directories, globs
    tokenizer: str  # name of a tokenizer, or directory of a run
    task: Task
    shard_tokens: int = 100_000_000
    tokenizer_bytes: int = 100_000_000  # most bytes of text that a tokenizer is trained on

    def as_json(self) -> dict[str, Any]:
        """Returns the settings by name, as JSON values."""
        task = self.task._asdict() | {"reading": self.task.reading._asdict(), "options": self.task.options._asdict()}
        return json.loads(json.dumps(self._asdict() | {"task": task}))


class InputFile(NamedTuple):
    """Input file."""

    path: Path
    bytes: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Returns the files that paths, directories and globs name, sorted by name, without duplicates.

    Raises:
      DataError: an input names no file.
    """
    sizes: dict[Path, int] = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [p for p in files_below(path) if formats.has_known_format(p)]
        else:
            files = [path] if path.is_file() else files_matching(path)
        if not files:
            extensions = ", ".join(f".{name}" for name in formats.FORMATS)
            problem = f"holds none of {extensions}" if path.is_dir() else "names no file"
            raise DataError(f"--input={name} {problem}")
        sizes |= {p: p.stat().st_size for p in files}
    return [InputFile(path, sizes[path]) for path in sorted(sizes)]


class Position(NamedTuple):
    """Reading position: index of the file, and number of its documents that are done."""

    file: int = 0
    document: int = 0


def chunks(
    sources: Sequence[InputFile], reading: formats.ReadOptions, begin: Position, advance: Callable[..., None]
) -> Iterator[tuple[Chunk, Position]]:
    """Iterates over chunks of about CHUNK_BYTES of documents from a position on, each with the position after it.

    Chunk boundaries depend on the files alone, provided that `begin` is a position that this function returned.
    """
    pending: list[tuple[Path, Item]] = []
    size = 0
    for file in range(begin.file, len(sources)):
        path = sources[file].path
        skipped = begin.document if file == begin.file else 0
        for number, item in enumerate(formats.items(path, reading, advance), 1):
            if number <= skipped:
                continue
            pending.append((path, item))
            size += formats.size_of(item)
            if size >= CHUNK_BYTES:
                yield Chunk(pending), Position(file, number)
                pending, size = [], 0
    if pending:
        yield Chunk(pending), Position(len(sources), 0)


class Progress(NamedTuple):
    """State saved with every finished shard, from which a preparation resumes."""

    position: Position
    documents: int  # number of documents read
    splits: dict[str, list[dict[str, Any]]]  # finished shards
    report: dict[str, Any]


STEP_COUNTS = {
    "step": str,
    "documents_in": int,
    "documents_out": int,
    "bytes_in": int,
    "bytes_out": int,
    "changed": int,
}
PROGRESS = {
    "position": schema.Row(int, int),
    "documents": int,
    "splits": {"train": [shards.SHARD], "held_out": [shards.SHARD]},
    "report": {"steps": [STEP_COUNTS], "reasons": {str: {"documents": int, "example": str}}},
}


def prepare(settings: Settings, output: Path, workers: int, restart: bool = False) -> dict[str, Any]:
    """Prepares the set `output`, or resumes an interrupted preparation of it.

    Args:
      settings: settings of the preparation.
      output: folder of the set, which must not exist.
      workers: number of processes; 1 uses only this one.
      restart: if True, discards an unfinished preparation that was started with other settings.

    Returns:
      the report, see gptjax.data.prepare.report.

    Raises:
      ConfigError, DataError: user errors. Only finished shards remain, in `output`.unfinished.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; give another --output")
    cleaning.check(settings.task.clean, settings.task.options)
    sources = find_inputs(settings.inputs)
    folder = shards.unfinished_dir(output)
    if (folder / "index.json").exists() and not (folder / "settings.json").exists():  # interrupted at the very end
        return _publish(folder, output)
    progress = _begin(folder, settings, sources, restart)
    documents.clear_cache()
    with Workers(workers) as pool:
        tokenizer = _tokenizer(settings, sources, folder, pool)
        pool.begin(settings.task, folder / "tokenizer")
        builder = Builder(settings, sources, folder, tokenizer, progress)
        builder.run(pool)
    builder.finish()
    return _publish(folder, output)


def _publish(folder: Path, output: Path) -> dict[str, Any]:
    """Deletes intermediate files, renames the folder to its final name, and returns the report."""
    for name in ("settings.json", "progress.json", "seen.sqlite", "seen.sqlite-wal", "seen.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    os.rename(folder, output)
    return read_json(output / "report.json")


def _begin(folder: Path, settings: Settings, sources: Sequence[InputFile], restart: bool) -> Progress:
    """Creates the unfinished folder, or reads its progress."""
    facts = {"settings": settings.as_json(), "sources": [[str(path), size] for path, size in sources]}
    exists = (folder / "settings.json").exists()
    if not exists and folder.exists() and any(not path.name.startswith(".settings.json") for path in folder.iterdir()):
        raise ConfigError(
            f"{folder} exists and is not an unfinished preparation; move it away, or give another --output"
        )
    same = exists and read_json(folder / "settings.json") == facts
    if exists and not restart and (same or (folder / "progress.json").exists()):  # else there is nothing to lose
        if not same:
            raise ConfigError(
                f"{folder} was started with other flags or files; pass those again to resume it, or --restart"
            )
        for path in folder.glob(".*"):  # partial files of a killed process
            path.unlink()
        console.say(f"resuming   {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomic(folder / "settings.json", json.dumps(facts, indent=1))
    if not (folder / "progress.json").exists():
        return Progress(Position(), 0, {split: [] for split in shards.SPLITS}, {})
    progress = schema.read(folder / "progress.json", PROGRESS)
    return Progress(Position(*progress["position"]), progress["documents"], progress["splits"], progress["report"])


def _tokenizer(settings: Settings, sources: Sequence[InputFile], folder: Path, pool: Workers) -> Tokenizer:
    """Loads the tokenizer of the folder; if there is none, copies that of a run or builds one, and saves it."""
    directory = folder / "tokenizer"
    if (directory / "facts.json").exists():
        return tokenizers.load(directory)
    run = Path(settings.tokenizer).expanduser()
    if (run / "tokenizer").is_dir():
        tokenizer: Tokenizer = tokenizers.load(run / "tokenizer")
    else:
        tokenizers.check_name(settings.tokenizer)
        needs_text = settings.tokenizer == "chars" or settings.tokenizer.startswith("bpe:")
        tokenizer = tokenizers.build(settings.tokenizer, _sample(settings, sources, pool) if needs_text else [])
    tokenizers.save(tokenizer, directory)
    return tokenizer


def _sample(settings: Settings, sources: Sequence[InputFile], pool: Workers) -> list[str]:
    """Returns a sample of cleaned documents, about `tokenizer_bytes` by hash of their text; all for `chars`."""
    size = sum(source.bytes for source in sources)
    share = 1.0 if settings.tokenizer == "chars" else min(1.0, settings.tokenizer_bytes / max(size, 1))
    pool.begin(settings.task, None)
    with console.bar("reading for the tokenizer", size, unit="B") as advance:
        incoming = (chunk for chunk, _ in chunks(sources, settings.task.reading, Position(), advance))
        documents = [text for texts in pool.map(sample_texts, ((chunk, share) for chunk in incoming)) for text in texts]
    if settings.tokenizer == "chars":
        return ["".join(sorted(set().union(*documents)))]
    return documents


class Builder:
    """Consumes the outcomes of the workers in order: drops duplicates, writes shards, and updates the report."""

    def __init__(
        self, settings: Settings, sources: Sequence[InputFile], folder: Path, tokenizer: Tokenizer, progress: Progress
    ) -> None:
        self.settings, self.sources, self.folder, self.tokenizer = settings, sources, folder, tokenizer
        self.start, self.documents, self.splits = progress.position, progress.documents, progress.splits
        self.report = Report(settings.task.clean, progress.report)
        self.dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        self.writers: dict[str, shards.ShardWriter] = {}

    def run(self, pool: Workers) -> None:
        """Processes all remaining files."""
        task = self.settings.task
        total = sum(source.bytes for source in self.sources)
        done = sum(source.bytes for source in self.sources[: self.start.file])
        with ExitStack() as stack:
            self.duplicates = stack.enter_context(dedup.DuplicateIndex(self.folder / "seen.sqlite", task.options))
            self.duplicates.delete_from(self.documents)
            advance = stack.enter_context(console.bar("preparing", total, done, unit="B"))
            stack.callback(self._abort)
            positions: list[Position] = []

            def incoming() -> Iterator[tuple[Chunk]]:
                for chunk, after in chunks(self.sources, task.reading, self.start, advance):
                    positions.append(after)
                    yield (chunk,)

            position = self.start
            for outcome in pool.map(process_chunk, incoming()):
                position = positions.pop(0)
                self._take(outcome)
                written = self.writers.get("train")
                if written and written.tokens >= self.settings.shard_tokens:
                    self._commit(position)
                advance(0, documents=f"{self.report.documents_out:,}", tokens=f"{self._tokens() / 1e6:,.1f} M")
            self._commit(position)

    def _take(self, outcome: Outcome) -> None:
        keep_M = self._without_duplicates(outcome)
        self.report.add(outcome)
        for split, side_M in (("train", ~outcome.held_out_M), ("held_out", outcome.held_out_M)):
            records = outcome.records.select(keep_M & side_M)
            if len(records.lengths_M):
                self._writer(split).append(records)
        self.documents += len(keep_M)

    def _without_duplicates(self, outcome: Outcome) -> np.ndarray:
        """Drops duplicates of earlier documents in the outcome, and returns a mask of the remaining documents."""
        checks: dict[str, Callable[[int, Any], int | None]] = {
            "exact": self.duplicates.exact,
            "near": self.duplicates.near,
        }
        for document in range(len(outcome.sizes_MS)):
            for step, name in enumerate(self.settings.task.clean, 1):
                if name in checks and outcome.sizes_MS[document, step] >= 0:
                    signature = outcome.signatures[name][document]
                    if checks[name](self.documents + document, signature) is not None:
                        outcome.drop(document, step, f"{name} duplicate of an earlier document")
                        break
        return outcome.sizes_MS[:, -1] >= 0

    def _writer(self, split: str) -> shards.ShardWriter:
        if split not in self.writers:
            number = max(len(of_split) for of_split in self.splits.values())
            with_prompts = bool(self.settings.task.reading.prompt_key)
            self.writers[split] = shards.ShardWriter(self.folder, split, number, self.dtype, with_prompts)
        return self.writers[split]

    def _tokens(self) -> int:
        open_ones = sum(writer.tokens for writer in self.writers.values())
        return open_ones + sum(shard["tokens"] for split in self.splits.values() for shard in split)

    def _commit(self, position: Position) -> None:
        """Closes the shards of both splits and saves the progress up to `position`."""
        for split, writer in self.writers.items():
            facts = writer.close()
            if facts:
                self.splits[split].append(facts)
        self.writers = {}
        self.duplicates.commit()
        progress = Progress(position, self.documents, self.splits, self.report.state())
        write_atomic(self.folder / "progress.json", json.dumps(progress._asdict()))

    def _abort(self) -> None:
        for writer in self.writers.values():
            writer.abort()

    def finish(self) -> None:
        """Writes the report and the index.

        Raises:
          DataError: no document is left.
        """
        delimiters = token_sets.delimiters_of(self.tokenizer)
        splits = {split: shards.totals(of_split) for split, of_split in self.splits.items()}
        if not splits["train"]["documents"]:
            raise DataError("no document is left to train on; the reasons: " + self.report.reasons_line())
        report = self.report.summary(splits)
        write_atomic(self.folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        made_with = {"name": self.tokenizer.name, "n_vocab": self.tokenizer.n_vocab, "closing": delimiters.closing}
        shards.write_index(
            self.folder,
            {
                "tokenizer": made_with | {"sha256": tokenizers.sha256(self.tokenizer)},
                "totals": splits,
                "splits": self.splits,
                "settings": self.settings.as_json(),
                "sources": [{"path": str(path), "bytes": size} for path, size in self.sources],
            },
        )
