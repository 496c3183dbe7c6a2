"""Prepared sets on disk: token ids in memory-mapped `.npy` shards. Files are written atomically.

    index.json                  counts, sources, the tokenizer's hash, a checksum for every file; written last
    report.json  tokenizer/     report of the preparation; tokenizer of the ids
    train_00000.npy             ids, uint16 or uint32
    train_00000.ends.npy        end of the record of each document, int64
    train_00000.prompts.npy     of a set of pairs: number of prompt ids of each record, int32
    held_out_00000.npy ...      the other side of the split

A set that is not finished has no index.json, and the name of its folder ends in `.unfinished`.
"""

import hashlib
import io
import json
import os
import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import CheckpointError, DataError
from gptjax.core import console, schema
from gptjax.core.files import parse_json, read_bytes, write_atomic
from gptjax.data.token_sets import Part, TokenSet
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "held_out")
HEADER = 128  # bytes of numpy's header of a one-dimensional array of any length

# Types of the numbers in a shard's files.
TOKENS, ENDS, PROMPTS = ("<u2", "<u4"), ("<i8",), ("<i4",)

Index = dict[str, Any]
FILE = {"file": str, "bytes": int, "sha256": str}
SHARD = {"documents": int, "tokens": int, "text_bytes": int, "files": [FILE]}
INDEX = {
    "format": int,
    "tokenizer": {"name": str, "n_vocab": int, "closing": [int], "sha256": str},
    "splits": {"train": [SHARD], "held_out": [SHARD]},
}


def unfinished_dir(folder: Path) -> Path:
    """Returns the folder in which a set is written before it is renamed."""
    return folder.parent / f"{folder.name}.unfinished"


def is_prepared(path: Path) -> bool:
    """Returns True if a folder is a prepared set, finished or not."""
    return (path / "index.json").is_file() or path.name.endswith(".unfinished") or unfinished_dir(path).is_dir()


# Writing


class ArrayWriter:
    """Writes a one-dimensional `.npy` file piece by piece; `close` renames it to its final name.

    Args:
      path: file to write.
      dtype: type of its numbers.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self._part = path.with_name(f".{path.name}.part")
        self._file = self._part.open("wb")
        self._file.write(bytes(HEADER))
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        """Appends numbers."""
        raw = np.ascontiguousarray(values, self.dtype)
        self._file.write(raw.data)
        self._digest.update(raw.data)
        self.count += len(raw)

    def close(self) -> dict[str, Any]:
        """Completes the file; returns its name, size, and the SHA-256 of its numbers followed by its header."""
        header = io.BytesIO()
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(header, facts)
        assert len(header.getvalue()) == HEADER
        self._digest.update(header.getvalue())
        self._file.seek(0)
        self._file.write(header.getvalue())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self.path)
        size = HEADER + self.count * self.dtype.itemsize
        return {"file": self.path.name, "bytes": size, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        """Deletes the file."""
        self._file.close()
        self._part.unlink(missing_ok=True)


class Records(NamedTuple):
    """Encoded documents to be stored."""

    tokens_N: np.ndarray  # ids of their records, concatenated
    lengths_M: np.ndarray  # number of ids of each record
    prompts_M: np.ndarray  # number of prompt ids of each record, prefix included
    text_bytes_M: np.ndarray  # size of the text of each, UTF-8

    def select(self, chosen_M: np.ndarray) -> "Records":
        """Returns the records where the mask is True."""
        selected = (array[chosen_M] for array in (self.lengths_M, self.prompts_M, self.text_bytes_M))
        return Records(self.tokens_N[np.repeat(chosen_M, self.lengths_M)], *selected)


class ShardWriter:
    """Writes the files of one shard of a split.

    Args:
      folder: folder of the set.
      split: "train" or "held_out".
      number: number of the shard.
      dtype: type of the ids.
      with_prompts: True if records are pairs.
    """

    def __init__(self, folder: Path, split: str, number: int, dtype: Any, with_prompts: bool) -> None:
        stem = f"{split}_{number:05d}"
        self.tokens = self.documents = self.bytes = 0
        kinds = {"": dtype, ".ends": np.int64} | ({".prompts": np.int32} if with_prompts else {})
        self._writers: dict[str, ArrayWriter] = {}
        try:
            for kind, kind_dtype in kinds.items():
                self._writers[kind] = ArrayWriter(folder / f"{stem}{kind}.npy", kind_dtype)
        except BaseException:
            self.abort()
            raise

    def append(self, records: "Records") -> None:
        """Appends the records of documents."""
        self._writers[""].append(records.tokens_N)
        self._writers[".ends"].append(self.tokens + np.cumsum(records.lengths_M))
        if ".prompts" in self._writers:
            self._writers[".prompts"].append(records.prompts_M)
        self.tokens += len(records.tokens_N)
        self.documents += len(records.lengths_M)
        self.bytes += int(records.text_bytes_M.sum())

    def close(self) -> dict[str, Any] | None:
        """Completes the shard; returns its entry of the index, or None, without files, if it has no documents."""
        if not self.documents:
            self.abort()
            return None
        files = [writer.close() for writer in self._writers.values()]
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.bytes, "files": files}

    def abort(self) -> None:
        """Deletes the files."""
        for writer in self._writers.values():
            writer.abort()


def write_index(folder: Path, index: Index) -> None:
    """Writes index.json, which marks a set as complete."""
    write_atomic(folder / "index.json", json.dumps({"format": FORMAT} | index, indent=1, ensure_ascii=False) + "\n")


# Reading


class PreparedSet(NamedTuple):
    """Open prepared set."""

    folder: Path
    metadata: Index
    train: TokenSet
    held_out: TokenSet
    fingerprint: str  # SHA-256 of index.json, which has a checksum of every file

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of its ids."""
        return load_tokenizer(self.folder, self.metadata)


def open_set(folder: Path) -> PreparedSet:
    """Opens a prepared set: reads its index and memory-maps its files, checking their sizes.

    Raises:
      DataError: the set is not finished or does not exist, or a file is missing or has another size.
    """
    raw = _read_index(folder)
    try:
        index = parse_json(raw, str(folder / "index.json"))
        schema.check(index, INDEX, "the index")
        if index["format"] != FORMAT:
            raise DataError(f"it has format {index['format']}, not {FORMAT}")
    except DataError as error:
        raise DataError(f"{folder / 'index.json'} is damaged ({error}); prepare the set again") from error
    closing = index["tokenizer"]["closing"]
    sides = [
        TokenSet([_part(folder, shard) for shard in index["splits"][split]], closing, f"{folder} ({split})")
        for split in SPLITS
    ]
    return PreparedSet(folder, index, sides[0], sides[1], hashlib.sha256(raw).hexdigest())


def _read_index(folder: Path) -> bytes:
    path = folder / "index.json"
    if path.is_file():
        return read_bytes(path)
    half = folder if folder.name.endswith(".unfinished") else unfinished_dir(folder)
    if half.is_dir():
        raise DataError(f"{half} is an unfinished preparation; run the same command again to resume it")
    raise DataError(f"{folder} is not a prepared set: it has no index.json")


def _part(folder: Path, shard: dict[str, Any]) -> Part:
    sizes = [shard["tokens"], *[shard["documents"]] * 2]
    kinds = zip(shard["files"], sizes, (TOKENS, ENDS, PROMPTS), strict=False)
    arrays = [_memory_map(folder / facts["file"], facts["bytes"], size, dtypes) for facts, size, dtypes in kinds]
    if len(arrays) < 2:
        raise DataError(
            f"{folder / 'index.json'} is damaged (a shard has no files of ids and ends); prepare the set again"
        )
    return Part(*arrays)


def _memory_map(path: Path, size: int, count: int, dtypes: Sequence[str]) -> np.ndarray:
    """Memory-maps a file of `size` bytes that holds `count` numbers of one of the types."""
    try:
        actual = path.stat().st_size
        if actual != size:
            raise DataError(
                f"{path} has {actual:,} bytes, not the {size:,} of its index: it is truncated or was changed"
            )
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; prepare the set again") from error
    # Raised for a damaged header; the last three come from Python's parser, depending on its version.
    except (ValueError, TypeError, OverflowError, tokenize.TokenError, SyntaxError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the set again") from error
    if array.dtype.str not in dtypes or array.shape != (count,):
        difference = f"{array.shape} of {array.dtype.str}, not ({count},) of {' or '.join(dtypes)}"
        raise DataError(f"{path} does not hold what the index says ({difference}); prepare the set again")
    return array


def load_tokenizer(folder: Path, index: Index) -> Tokenizer:
    """Loads the tokenizer of a set.

    Raises:
      DataError: it is damaged, or is not the one that the set was made with.
    """
    try:
        tokenizer = tokenizers.load(folder / "tokenizer")
    except CheckpointError as error:
        raise DataError(str(error)) from error
    check_tokenizer(folder, index, tokenizer)
    return tokenizer


def check_tokenizer(folder: Path, index: Index, tokenizer: Tokenizer) -> None:
    """Raises DataError if a set was made with another tokenizer."""
    expected = index["tokenizer"]
    if expected["sha256"] != tokenizers.sha256(tokenizer):
        raise DataError(
            f"{folder} was made with another tokenizer ({expected['name']}, {expected['n_vocab']:,} ids) than this "
            f"run's ({tokenizer.name}, {tokenizer.n_vocab:,} ids); prepare it again with the run's tokenizer"
        )


def verify(folder: Path) -> int:
    """Verifies the checksum of every file of a set; returns the number of files.

    Raises:
      DataError: a file differs, or see `open_set`.
    """
    opened = open_set(folder)
    opened.tokenizer()
    files = [facts for split in SPLITS for shard in opened.metadata["splits"][split] for facts in shard["files"]]
    with console.bar(f"verifying {folder}", sum(facts["bytes"] for facts in files)) as advance:
        for facts in files:
            if _sha256(folder / facts["file"], advance) != facts["sha256"]:
                raise DataError(f"{folder / facts['file']} has changed since it was written; prepare the set again")
    return len(files)


def _sha256(path: Path, advance: Any) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        header = file.read(HEADER)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            advance(len(chunk))
    digest.update(header)
    return digest.hexdigest()


def totals(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Returns the total documents, tokens and bytes of text of shards."""
    return {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "text_bytes")}
