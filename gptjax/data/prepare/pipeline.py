"""From a pile of files to a prepared set: documents read, cleaned, split and encoded by all cores, written in order.

One process reads files into chunks of documents and writes what comes back; workers do the rest, which is a pure
function of a chunk. Only duplicates need to know what came before; they are decided where everything is in order. So
the set is the same for any number of workers, and for a preparation that was cut short and started again.
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

CHUNK_BYTES = 2**20  # bytes of documents that go to a worker at once


class Settings(NamedTuple):
    """What a set is made of and how; two preparations with the same one, of the same files, give the same set."""

    inputs: tuple[str, ...]  # files, directories, globs
    tokenizer: str  # a name, or a run's directory
    task: Task
    shard_tokens: int = 100_000_000
    tokenizer_bytes: int = 100_000_000  # of text that a tokenizer is trained on, at most

    def as_json(self) -> dict[str, Any]:
        """All of it by name, as JSON has it."""
        task = self.task._asdict() | {"reading": self.task.reading._asdict(), "options": self.task.options._asdict()}
        return json.loads(json.dumps(self._asdict() | {"task": task}))


class InputFile(NamedTuple):
    """A file to read."""

    path: Path
    bytes: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """The files that paths, directories and globs name, in the order of their names, each once.

    Raises:
      DataError: one of them names none.
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
    """Where reading has come: the file, and how many of its documents are behind."""

    file: int = 0
    document: int = 0


def chunks(
    sources: Sequence[InputFile], reading: formats.ReadOptions, begin: Position, advance: Callable[..., None]
) -> Iterator[tuple[Chunk, Position]]:
    """Documents from a position on, about CHUNK bytes at a time, each with the position after it.

    Where chunks begin depends on the files alone, as long as `begin` is a position that this gave.
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
    """What is kept with every finished shard, so that a preparation goes on behind it."""

    position: Position
    documents: int  # read so far
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
    """Makes the prepared set `output`, or goes on with it where an earlier preparation was cut short.

    Args:
      settings: see there.
      output: a folder that is not there yet.
      workers: processes; 1: none but this one.
      restart: whether what was begun with other settings is thrown away.

    Returns:
      the report; see gptjax.data.prepare.report.

    Raises:
      ConfigError, DataError: what the user can mend. Finished shards stay in `output`.unfinished, and nothing else.
    """
    if output.exists():
        raise ConfigError(f"{output} exists; give another --output")
    cleaning.check(settings.task.clean, settings.task.options)
    sources = find_inputs(settings.inputs)
    folder = shards.unfinished_dir(output)
    if (folder / "index.json").exists() and not (folder / "settings.json").exists():  # cut short at the very end
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
    """Clears away what only the making of a whole set needed, and gives it its name; its report."""
    for name in ("settings.json", "progress.json", "seen.sqlite", "seen.sqlite-wal", "seen.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    os.rename(folder, output)
    return read_json(output / "report.json")


def _begin(folder: Path, settings: Settings, sources: Sequence[InputFile], restart: bool) -> Progress:
    """Makes the unfinished folder, or reads how far it has come."""
    facts = {"settings": settings.as_json(), "sources": [[str(path), size] for path, size in sources]}
    exists = (folder / "settings.json").exists()
    if not exists and folder.exists() and any(not path.name.startswith(".settings.json") for path in folder.iterdir()):
        raise ConfigError(f"{folder} exists and is no unfinished preparation; move it away, or give another --output")
    same = exists and read_json(folder / "settings.json") == facts
    if exists and not restart and (same or (folder / "progress.json").exists()):  # else there is nothing to lose
        if not same:
            raise ConfigError(
                f"{folder} was begun with other flags or other files; give those again to go on with it, or --restart"
            )
        for path in folder.glob(".*"):  # what was being written when it was killed
            path.unlink()
        console.say(f"going on   with {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomic(folder / "settings.json", json.dumps(facts, indent=1))
    if not (folder / "progress.json").exists():
        return Progress(Position(), 0, {split: [] for split in shards.SPLITS}, {})
    progress = schema.read(folder / "progress.json", PROGRESS)
    return Progress(Position(*progress["position"]), progress["documents"], progress["splits"], progress["report"])


def _tokenizer(settings: Settings, sources: Sequence[InputFile], folder: Path, pool: Workers) -> Tokenizer:
    """The set's tokenizer, in the folder: kept from before, taken from a run, or made, from the text where need be."""
    place = folder / "tokenizer"
    if (place / "facts.json").exists():
        return tokenizers.load(place)
    run = Path(settings.tokenizer).expanduser()
    if (run / "tokenizer").is_dir():
        tokenizer: Tokenizer = tokenizers.load(run / "tokenizer")
    else:
        tokenizers.check_name(settings.tokenizer)
        needs_text = settings.tokenizer == "chars" or settings.tokenizer.startswith("bpe:")
        tokenizer = tokenizers.build(settings.tokenizer, _sample(settings, sources, pool) if needs_text else [])
    tokenizers.save(tokenizer, place)
    return tokenizer


def _sample(settings: Settings, sources: Sequence[InputFile], pool: Workers) -> list[str]:
    """Cleaned documents, by hash of their text, of about `tokenizer_bytes` where there are more; of `chars`, all."""
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
    """The part that runs in order: takes the workers' outcomes, drops duplicates, writes shards, keeps account."""

    def __init__(
        self, settings: Settings, sources: Sequence[InputFile], folder: Path, tokenizer: Tokenizer, progress: Progress
    ) -> None:
        self.settings, self.sources, self.folder, self.tokenizer = settings, sources, folder, tokenizer
        self.start, self.documents, self.splits = progress.position, progress.documents, progress.splits
        self.report = Report(settings.task.clean, progress.report)
        self.dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        self.writers: dict[str, shards.ShardWriter] = {}

    def run(self, pool: Workers) -> None:
        """Reads, and writes shards, to the end of the files."""
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
        """Which documents stay; those that repeat an earlier one are marked in the outcome as dropped there."""
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
        """Closes the shards of both sides and writes down that all before `position` is in them."""
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
        """Writes report and index.

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
