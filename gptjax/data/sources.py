"""Sources of text: the standard library of Python, files, directories, URLs; read and split into documents.

User errors are DataErrors of one line.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.errors import DataError
from gptjax.core.files import decode, read_bytes
from gptjax.data.download import download


class Document(NamedTuple):
    """Text and the name that decides its side of the split."""

    name: str
    text: str


class Corpus(NamedTuple):
    """Training and held-out documents."""

    train: list[Document]
    held_out: list[Document]


def stdlib(config: Any) -> Iterator[Document]:
    """Reads the standard library of the running Python without its tests; names are paths in it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts):
            yield Document(relative.as_posix(), read_text(path))


def text(config: Any) -> Iterator[Document]:
    """Reads the files of `data.path`: one file, the .txt files below a directory, a glob, or a URL."""
    if not config.path:
        raise DataError("--config.data.path is empty; give a text file, a directory, a glob or an https address")
    for path, name in sorted(_files(config)):
        yield Document(name, read_text(path))


SOURCES: dict[str, Callable[[Any], Iterator[Document]]] = {"stdlib": stdlib, "text": text}


def _files(config: Any) -> list[tuple[Path, str]]:
    if config.path.startswith(("http://", "https://")):
        return [(download(config.path, config.sha256), config.path)]
    path = Path(config.path)
    if path.is_dir():
        paths = [p for p in files_below(path) if p.suffix == ".txt"]
        if not paths:
            raise DataError(f"{path} holds no .txt files; other files can be named by a glob such as '{path}/**/*.py'")
        return [(p, p.relative_to(path).as_posix()) for p in paths]
    if path.exists():
        return [(path, path.name)]
    paths = files_matching(path)
    if not paths:
        raise DataError(f"there is no file {path}")
    prefix = takewhile(lambda part: not glob.has_magic(part), path.parts)
    root = Path(*prefix)
    return [(p, p.relative_to(root).as_posix()) for p in paths]


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, following links, sorted by name.

    Raises:
      DataError: a folder cannot be listed, or a link is broken: unreadable files are never skipped.
    """
    return sorted(path for path in _walk(folder, hidden=True) if path.is_file())


def files_matching(pattern: Path) -> list[Path]:
    """Returns the files that match a glob, where `**` is any number of folders, sorted by name.

    Raises:
      DataError: see `files_below`; raised for folders that the pattern visits.
    """
    prefix = list(takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    matching = _match(Path(*prefix), pattern.parts[len(prefix) :])
    return sorted({path for path in matching if exists(path) and path.is_file()})


def exists(path: Path) -> bool:
    """Returns True if the path exists.

    Raises:
      DataError: the path is a broken or circular link, or cannot be accessed.
    """
    try:
        if not path.is_symlink():
            return path.exists()
        path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return True


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def _walk(folder: Path, hidden: bool) -> Iterator[Path]:
    # Visits each folder once, by its own name if it has one here: links are followed last.
    visited, links = set[Path](), [folder]
    while links:
        pending = [links.pop(0)]
        while pending:
            current = pending.pop()
            if current.resolve() in visited:
                continue
            visited.add(current.resolve())
            for path in _list(current):
                if (hidden or not path.name.startswith(".")) and exists(path):
                    yield path
                    if path.is_dir():
                        (links if path.is_symlink() else pending).append(path)


def _match(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    first, *rest = parts
    if not glob.has_magic(first):
        yield from _match(folder / first, tuple(rest))
    elif not folder.is_dir():
        return
    elif first == "**":
        for path in [folder, *_walk(folder, hidden=False)]:
            if path.is_dir() or not rest:
                yield from _match(path, tuple(rest))
    else:
        for path in _list(folder):
            hidden = path.name.startswith(".") and not first.startswith(".")
            if fnmatchcase(path.name, first) and not hidden:
                yield from _match(path, tuple(rest))


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, keeping line ends.

    Raises:
      DataError: the file cannot be read, or is not text.
    """
    raw = read_bytes(path)
    if b"\0" in raw:
        raise DataError(f"{path} is not text: it has a zero byte at {raw.index(0)}")
    return decode(raw, str(path))


def is_held_out(name: str, fraction: float) -> bool:
    """Returns True if a document is held out: SHA-256 of its name modulo 10,000 is below fraction * 10,000."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10_000 < fraction * 10_000


def split(documents: list[Document], fraction: float) -> Corpus:
    """Splits documents by hash of their name, or holds out the tail of each if that leaves a side empty (few files).

    Args:
      documents: all documents, in order.
      fraction: fraction to hold out, 0 to 1, of the documents, or of the characters of each.
    """
    train = [d for d in documents if not is_held_out(d.name, fraction)]
    held_out = [d for d in documents if is_held_out(d.name, fraction)]
    if not train or not held_out:
        cuts = [int(len(d.text) * (1 - fraction)) for d in documents]
        train = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
        held_out = [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]
    return Corpus(train, held_out)


def read(config: Any) -> Corpus:
    """Reads the corpus that `config` (`config.data` of a run) names.

    Raises:
      DataError: text is missing, unreadable or empty.
    """
    documents = [document for document in SOURCES[config.source](config) if document.text]
    if not documents:
        origin = config.path or "the standard library's source (this Python came without it)"
        raise DataError(f"{origin} is empty: there is nothing to train on")
    corpus = split(documents, config.held_out)
    if not any(d.text for d in corpus.train) or not any(d.text for d in corpus.held_out):
        origin, share = config.path or config.source, config.held_out
        raise DataError(f"{origin} is too short to hold out data.held_out={share} of it")
    return corpus


def fingerprint(corpus: Corpus) -> str:
    """Returns SHA-256 over names and texts of both sides, by which a run detects that its text has changed."""
    digest = hashlib.sha256()
    for side in corpus:
        for document in side:
            for part in (document.name, document.text):
                raw = part.encode()
                digest.update(len(raw).to_bytes(8, "big") + raw)
        digest.update(b"|")
    return digest.hexdigest()
