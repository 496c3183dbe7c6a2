"""Parallel text: pairs of a source and a target, from aligned files or from one file with both.

Reads, splits and encodes pairs; gptjax.data.layouts makes rows of them. A pair is a record of a TokenSet whose prompt
is the source. User errors are DataErrors of one line.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import console
from gptjax.core.files import decode
from gptjax.data import records, sources, streams
from gptjax.data.records import RecordOptions
from gptjax.data.sources import Corpus, Document
from gptjax.data.streams import suffix_of
from gptjax.data.token_sets import Part, TokenSet
from gptjax.data.tokenizers.tokenizers import Tokenizer, encode

TRAIN, HELD_OUT = "train", "val"  # splits for training and for evaluation during training; other splits are for tests


class Pair(NamedTuple):
    """Text and its translation."""

    source: str
    target: str


def read(config: Any, split: str) -> list[Pair]:
    """Reads the pairs of a split.

    `config.path` is a directory of aligned `SPLIT.LANGUAGE` files, plain, .gz or .zst, or one file (see
    `read_pair_file`), whose held-out part is chosen by hash of the source, so that no source is in both splits. Pairs
    without a source or a target are dropped and reported.

    Args:
      config: `config.data` of a run.
      split: "train", "val", or the name of another split.

    Raises:
      DataError: files are missing, damaged or of different lengths, or the split has no pairs.
    """
    if not config.path:
        raise DataError("--config.data.path is empty; give a directory of parallel text, or a tab-separated file")
    path = Path(config.path)
    if not path.exists():
        raise DataError(f"there is no {path}")
    if path.is_dir():
        source_path, target_path = (_file_of(path, split, language) for language in config.languages)
        result = read_aligned(source_path, target_path)
    else:
        result = _of_split(read_pair_file(path, config.columns, config.languages), split, config.held_out, path)
    if not result:
        raise DataError(f"{path} has no pairs in {split!r}")
    return result


def read_aligned(source: Path, target: Path) -> list[Pair]:
    """Reads pairs from two files whose lines are translations of each other.

    Raises:
      DataError: a file cannot be read, or one has more lines.
    """
    source_lines, target_lines = lines(source), lines(target)
    if len(source_lines) != len(target_lines):
        shorter, longer = sorted([(len(source_lines), source), (len(target_lines), target)])
        raise DataError(
            f"{source.name} has {len(source_lines):,} lines and {target.name} has {len(target_lines):,}: "
            f"line {shorter[0] + 1:,} of {longer[1].name} has no partner; the lines of both must be translations"
        )
    pairs = [Pair(*sides) for sides in zip(source_lines, target_lines, strict=True)]
    return _drop_incomplete(pairs, f"{source} and {target.name}")


def read_pair_file(path: Path, columns: Sequence[int], languages: Sequence[str]) -> list[Pair]:
    """Reads pairs from one file: a table without a header, tab-separated unless it is a .csv, or records with names.

    Args:
      path: file.
      columns: columns of source and target of a table, from 0.
      languages: languages of source and target, the names of the fields of a record or of its object `translation`.

    Raises:
      ConfigError: a library that the format needs is not installed.
      DataError: the file cannot be read, or a record lacks a side.
    """
    pairs = []
    format = suffix_of(path) if suffix_of(path) in records.FORMATS else "tsv"
    has_names = format not in records.ROWS
    for record in records.read(path, RecordOptions(numbered=True), format):
        fields = record.fields
        if has_names and isinstance(fields.get("translation"), dict):  # as in Hugging Face's data sets
            fields = fields["translation"]
        sides = [fields.get(name) for name in (languages if has_names else map(str, columns))]
        if not all(isinstance(side, str) for side in sides):
            expected = (
                f"texts {' and '.join(languages)}" if has_names else f"a source and a target in columns {columns}"
            )
            has = ", ".join(map(str, fields)) if has_names else f"{len(fields)} column{'s'[: len(fields) > 1]}"
            raise DataError(f"{record.where} has {has}; {expected} are read")
        pairs.append(Pair(*map(str, sides)))
    return _drop_incomplete(pairs, str(path))


def lines(path: Path) -> list[str]:
    """Reads the lines of a UTF-8 file, plain, .gz or .zst; only line feeds end lines, not Unicode line separators.

    Raises:
      ConfigError: the library that decompresses it is not installed.
      DataError: the file cannot be read, is damaged, or is not UTF-8.
    """
    with streams.open_stream(path) as (_, stream):
        text = decode(b"".join(line for _, line in streams.lines(path, stream)), str(path))
    return text.removesuffix("\n").split("\n") if text else []


def _drop_incomplete(pairs: list[Pair], location: str) -> list[Pair]:
    stripped = (Pair(pair.source.strip(), pair.target.strip()) for pair in pairs)
    complete = [pair for pair in stripped if pair.source and pair.target]
    if len(complete) < len(pairs):
        message = f"{len(pairs) - len(complete):,} of {len(pairs):,} pairs have an empty side and are left out"
        console.say(f"pairs      {location}: {message}")
    return complete


def _of_split(pairs: list[Pair], split: str, fraction: float, path: Path) -> list[Pair]:
    if split not in (TRAIN, HELD_OUT):
        raise DataError(f"{path} is one file and has no split {split!r}; there are {TRAIN}, {HELD_OUT}")
    return [pair for pair in pairs if sources.is_held_out(pair.source, fraction) == (split == HELD_OUT)]


def _file_of(folder: Path, split: str, language: str) -> Path:
    names = [f"{split}.{language}{packed}" for packed in ("", *(f".{name}" for name in streams.COMPRESSED))]
    for name in names:
        if sources.exists(folder / name) and (folder / name).is_file():
            return folder / name
    languages_by_split = splits(folder)
    available = ", ".join(f"{name} ({' '.join(languages)})" for name, languages in sorted(languages_by_split.items()))
    raise DataError(f"{folder} has no {' or '.join(names)}; there are {available or 'none such'}")


def splits(folder: Path) -> dict[str, list[str]]:
    """Returns the languages of each split of a directory of parallel text, by name of the split."""
    by_split: dict[str, set[str]] = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"(.+?)\.([A-Za-z]{2,3}(?:[_-][A-Za-z]+)?)(\.gz|\.zst)?", path.name)
        if match and match[2] not in ("gz", "zst", "txt") and path.is_file():
            by_split.setdefault(match[1], set()).add(match[2])
    return {split: sorted(languages) for split, languages in by_split.items()}


def corpus(train: Sequence[Pair], held_out: Sequence[Pair]) -> Corpus:
    """Returns both splits as documents, for `gptjax.data.sources.fingerprint`."""
    return Corpus(*([Document(*pair) for pair in side] for side in (train, held_out)))


def source_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a source for an encoder: the begin ids, if any, the ids of the text, the end."""
    return [*tokenizer.begin, *target_ids(tokenizer, text)]


def target_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a target for a decoder: the ids of the text, the end.

    Raises:
      DataError: the tokenizer has no end.
    """
    if tokenizer.end is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no end of text, which pairs need; take bytes or bpe:N")
    return [*encode(tokenizer, text), tokenizer.end]


def to_token_set(tokenizer: Tokenizer, pairs: Sequence[Pair], label: str, name: str) -> TokenSet:
    """Encodes pairs, source then target, as a token set in memory, showing a progress bar with that label."""

    def ids_of_pairs() -> Iterator[tuple[list[int], list[int]]]:
        with console.bar(label, len(pairs)) as advance:
            for pair in pairs:
                yield source_ids(tokenizer, pair.source), target_ids(tokenizer, pair.target)
                advance(1)

    encoded_pairs = list(ids_of_pairs())
    tokens_N = np.concatenate([np.array(ids, np.int32) for pair in encoded_pairs for ids in pair])
    prompts_M = np.array([len(source) for source, _ in encoded_pairs])
    ends_M = np.cumsum([len(source) + len(target) for source, target in encoded_pairs], dtype=np.int64)
    return TokenSet([Part(tokens_N, ends_M, prompts_M)], name=name)
