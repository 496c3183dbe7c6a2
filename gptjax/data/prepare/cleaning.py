"""Cleaning steps of a corpus: a table from names to functions of the text of a document.

A step is a pure function, so that any number of workers can run it on documents in any order. The two steps that depend
on earlier documents, `exact` and `near`, have their own table: workers compute signatures, and `dedup.DuplicateIndex`
compares them.
"""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import did_you_mean
from gptjax.config.errors import ConfigError, DataError
from gptjax.core.files import decode, parse_json
from gptjax.data import records
from gptjax.data.prepare import dedup, filters, pii
from gptjax.data.sources import read_text
from gptjax.data.streams import lines, open_stream, suffix_of


class Dropped(NamedTuple):
    """Result of a step that drops a document; `reason` is a short phrase, the same for all that fail a rule."""

    reason: str


Step = Callable[[str], str | Dropped]


class CleaningOptions(NamedTuple):
    """Options of the steps."""

    min_words: int = 50  # length: documents with fewer are dropped
    max_words: int = 100_000  # length: documents with more are dropped
    keep_scripts: tuple[str, ...] = ()  # script: all others are dropped; names are filters.SCRIPTS
    drop_scripts: tuple[str, ...] = ()  # script: these are dropped
    blocklist: str = ""  # blocklist: file with one term per line
    evaluation: tuple[str, ...] = ()  # decontaminate: files of evaluation data
    near_threshold: float = 0.7  # near: Jaccard similarity of shingles from which two documents are duplicates
    near_shingle: int = 5  # near: words per shingle
    near_permutations: int = 128  # near: length of a signature


def _nfc(options: CleaningOptions) -> Step:
    """Normalizes to Unicode's composed form (NFC)."""
    return partial(unicodedata.normalize, "NFC")


# Control characters but tab and newline, the byte order mark, noncharacters, and surrogates, which UTF-8 cannot hold.
# Format characters stay: emoji and Indic scripts are written with joiners, Arabic and Hebrew with direction marks.
_REMOVED = "\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ud800-\udfff\ufffe\uffff"
_REMOVED_BEYOND = "".join(chr(plane * 0x10000 + last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF))
# The range comes first: otherwise these 32 would be compared with every character of every text.
_CONTROL = re.compile(f"[{_REMOVED}\U0001fffe-\U0010ffff](?<=[{_REMOVED}{_REMOVED_BEYOND}])")


def _control(options: CleaningOptions) -> Step:
    """Turns line ends into newlines and removes control characters."""
    return lambda text: _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _rule_filter(rules: Iterable[filters.Rule]) -> Step:
    def step(text: str) -> str | Dropped:
        reason = next(filters.failed_rules(rules, text), None)
        return text if reason is None else Dropped(reason)

    return step


def _length(options: CleaningOptions) -> Step:
    """Applies Gopher's rules on the number and length of words."""
    if not 0 <= options.min_words <= options.max_words:
        raise ConfigError(f"min_words={options.min_words} must be at least 0 and at most max_words={options.max_words}")
    return _rule_filter(filters.length_rules(options.min_words, options.max_words))


def _boilerplate(options: CleaningOptions) -> Step:
    """Applies Gopher's other quality rules."""
    return _rule_filter(filters.QUALITY)


def _repetition(options: CleaningOptions) -> Step:
    """Applies Gopher's rules on repetition."""
    return _rule_filter(filters.REPETITION)


def _script(options: CleaningOptions) -> Step:
    """Drops documents by the script of most of their letters."""
    keep, drop = options.keep_scripts, options.drop_scripts
    for name in (*keep, *drop):
        if name not in filters.SCRIPTS:
            near = did_you_mean(name, filters.SCRIPTS)
            raise ConfigError(f"unknown script {name!r}{near or '; there are ' + ', '.join(filters.SCRIPTS)}")
    if not keep and not drop:
        raise ConfigError("the step script needs keep_scripts or drop_scripts")

    def step(text: str) -> str | Dropped:
        script = filters.dominant_script(text)
        return Dropped(f"script {script}") if script in drop or (keep and script not in keep) else text

    return step


def _personal(options: CleaningOptions) -> Step:
    """Replaces personal data by tags."""
    return pii.scrub


def _is_whole_word(text: str, start: int, end: int) -> bool:
    """Returns True if no word of a script with spaces continues beyond either end."""
    return not (
        _are_one_word(text[start - 1 : start], text[start]) or _are_one_word(text[end - 1], text[end : end + 1])
    )


def _are_one_word(left: str, right: str) -> bool:
    return all(
        character and unicodedata.category(character)[0] in "LMN" and not filters.has_unspaced(character)
        for character in (left, right)
    )


def contains_term(text: str, term: str) -> bool:
    """Returns True if a text contains a term, both case-folded: as whole words, anywhere in scripts without spaces."""
    start = text.find(term)
    while start >= 0:
        if filters.has_unspaced(term) or _is_whole_word(text, start, start + len(term)):
            return True
        start = text.find(term, start + 1)
    return False


def _blocklist(options: CleaningOptions) -> Step:
    """Drops documents that contain a term of a file, ignoring case; spaces in a term match any whitespace."""
    if not options.blocklist:
        raise ConfigError("the step blocklist needs blocklist, a file with a term a line")
    lines = unicodedata.normalize("NFC", read_text(Path(options.blocklist))).casefold().split("\n")
    # Terms are indexed by their first one or two words, or by two characters if they need not be words: only terms
    # whose beginning is in the text are searched, so that ten thousand cost as much as ten.
    by_words: dict[tuple[str, ...], list[str]] = defaultdict(list)
    by_pair: dict[str, list[str]] = defaultdict(list)
    terms = {" ".join(line.split()) for line in lines} - {""}
    if not terms:
        raise DataError(f"{options.blocklist} holds no terms")
    for term in sorted(terms):
        words = filters.tokens(term)
        if words and not filters.has_unspaced(term):
            by_words[tuple(words[:2])].append(term)
        else:
            by_pair[term[:2]].append(term)
    only_unspaced = all(map(filters.has_unspaced, itertools.chain.from_iterable(by_pair.values())))

    def candidates(folded: str) -> Iterator[str]:
        words = filters.tokens(folded)
        for key in by_words.keys() & set(itertools.chain(zip(words), itertools.pairwise(words))):
            yield from by_words[key]
        if by_pair and (not only_unspaced or filters.has_unspaced(folded)):
            pairs = set(map("".join, itertools.pairwise(folded))) | set(folded)
            for pair in by_pair.keys() & pairs:
                yield from by_pair[pair]

    def step(text: str) -> str | Dropped:
        folded = " ".join(text.casefold().split())
        matches = any(contains_term(folded, term) for term in candidates(folded))
        return Dropped("a term of the blocklist") if matches else text

    return step


_GRAM = 13  # words, as in arXiv 2005.14165, appendix C


def evaluation_items(path: str) -> Iterator[str]:
    """Iterates over the texts of an evaluation file: strings of .json, .jsonl and .parquet, cells of a table, else
    paragraphs.

    Raises:
      DataError: the file cannot be read, or does not have the format of its name.
    """
    file = Path(path)
    with open_stream(file) as (_, stream):
        match suffix_of(file):
            case "json":
                yield from records.strings(parse_json(stream.read(), path, finite=False))
            case "jsonl":
                for number, line in lines(file, stream):
                    if line.strip():
                        value = parse_json(line, f"{path}, line {number:,}", finite=False)
                        yield from records.strings(value)
            case "csv" | "tsv" as kind:
                for _, row, _ in records.ROWS[kind](file, stream, None):
                    yield from row
            case "parquet":
                for record in records.read(file):
                    yield from records.strings(record.fields)
            case _:
                yield from re.split(r"\n\s*\n", decode(stream.read(), path))


def _gram_hashes(text: str) -> np.ndarray:
    """Returns a 64-bit hash of each 13-gram of words, uint64; it differs between runs of Python."""
    words = filters.tokens(text)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    count = max(len(words) - _GRAM + 1, 0)
    sums = np.zeros(count, np.uint64)
    for place in range(_GRAM if count else 0):
        sums = sums * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + count]
    return sums


def _decontaminate(options: CleaningOptions) -> Step:
    """Drops documents that share a 13-gram with evaluation data (arXiv 2005.14165, appendix C).

    Words are lower-cased, without punctuation; shorter evaluation items cannot match.
    """
    if not options.evaluation:
        raise ConfigError("the step decontaminate needs evaluation, the files of what models are evaluated on")
    items = itertools.chain.from_iterable(map(evaluation_items, options.evaluation))
    hashes = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_gram_hashes, items)]))
    # Indexed by the first 24 bits, which rule out most n-grams of a document without a search.
    maybe_present = np.zeros(1 << 24, bool)
    maybe_present[hashes >> np.uint64(40)] = True

    def step(text: str) -> str | Dropped:
        grams = _gram_hashes(text)
        grams = grams[maybe_present[grams >> np.uint64(40)]]
        shared = len(grams) and (hashes[np.searchsorted(hashes, grams).clip(max=len(hashes) - 1)] == grams).any()
        return Dropped("13 words of an evaluation") if shared else text

    return step


STEPS: dict[str, Callable[[CleaningOptions], Step]] = {
    "nfc": _nfc,
    "control": _control,
    "length": _length,
    "script": _script,
    "boilerplate": _boilerplate,
    "repetition": _repetition,
    "blocklist": _blocklist,
    "decontaminate": _decontaminate,
    "personal": _personal,
}


def _exact(options: CleaningOptions) -> Callable[[str], bytes]:
    return dedup.exact_signature


def _near(options: CleaningOptions) -> Callable[[str], np.ndarray]:
    dedup.check(options)
    return partial(dedup.near_signature, options=options)


# Signatures that workers compute for the methods of `dedup.DuplicateIndex` of the same names.
SIGNATURES: dict[str, Callable[[CleaningOptions], Callable[[str], Any]]] = {"exact": _exact, "near": _near}

# In the recommended order: rules apply to cleaned characters, tags come after the searches, and only documents that no
# other step drops are added to the index of duplicates.
NAMES = (*STEPS, *SIGNATURES)


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError if a step is unknown or named twice; does not check options."""
    for place, name in enumerate(names):
        if name not in NAMES:
            raise ConfigError(f"unknown step {name!r}{did_you_mean(name, NAMES)}")
        if name in names[:place]:
            raise ConfigError(f"the step {name} is named twice")


def check(names: Sequence[str], options: CleaningOptions) -> None:
    """Creates every step once, so that errors are raised before any work starts.

    Raises:
      ConfigError: a step is unknown, an option is missing or invalid, or a library is not installed.
      DataError: a file of the options cannot be read.
    """
    check_names(names)
    for name in names:
        (STEPS | SIGNATURES)[name](options)
