"""Quality filters for text: Gopher's rules (arXiv 2112.11446, appendix A.1.1), and the script of a text.

Every rule compares a measure, a function of the `TextParts` of a text, with the limits in the tables at the end. A
measure is NaN if its rule does not apply to a text.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from itertools import islice
from typing import NamedTuple

import numpy as np

# Blocks of scripts without spaces between words: Thai and Lao, Tibetan, Myanmar, Khmer, kana, Han. Of the small ones
# only letters count, so that their marks and stops stay with the letter before them, as in scripts with spaces.
_SMALL_BLOCKS = (
    *range(0x0E00, 0x10A0),
    *range(0x1780, 0x1800),
    *range(0x3005, 0x3100),
    *range(0x31F0, 0x3200),
    *range(0xFF66, 0xFFA0),
)
_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_UNSPACED = _HAN + "".join(chr(code) for code in _SMALL_BLOCKS if chr(code).isalpha())
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[^\w\s]*[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SPACED_TOKEN = re.compile(r"[^\W_]+")
_ASCII_TOKEN = bytes(code if chr(code).isalnum() else ord(" ") for code in range(128)) + bytes(128)

_LETTER = re.compile(r"[^\W\d_]")
_BLANK_LINES = re.compile(r"\n\s*\n")
_BULLETS = tuple("*-\u2013•‣\u2043◦∙·●○■□▪▫▶►")  # not the em dash: dialogue begins with it in many languages
_ELLIPSES = ("...", "…")
_STOP_WORDS = [re.compile(rf"\b{word}\b") for word in ("the", "be", "to", "of", "and", "that", "have", "with")]


def has_unspaced(text: str) -> bool:
    """Returns True if a text has letters of a script without spaces between words."""
    return not text.isascii() and _HAS_UNSPACED.search(text) is not None


def words(text: str) -> list[str]:
    """Splits a text into words with their punctuation, or characters in scripts without spaces."""
    return _WORD.findall(text) if has_unspaced(text) else text.split()


def tokens(text: str) -> list[str]:
    """Splits a text into lower-cased words without punctuation, or characters in scripts without spaces."""
    text = text.lower()
    if text.isascii():  # three times as fast
        return text.encode().translate(_ASCII_TOKEN).decode().split()
    return (_TOKEN if has_unspaced(text) else _SPACED_TOKEN).findall(text)


class Repeats(NamedTuple):
    """Occurrences of the n-grams of words that occur more than once, sorted by n-gram and position."""

    ids: np.ndarray  # number of the n-gram, from 0 without gaps, int64
    starts: np.ndarray  # index of its first word, int64
    is_repeat: np.ndarray  # True for all but the first occurrence of an n-gram


class TextParts:
    """Words, lines, paragraphs and repeated n-grams of a text, computed on first access."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._repeats: dict[int, Repeats] = {}

    @cached_property
    def words(self) -> list[str]:
        """Words, see `words`."""
        return words(self.text)

    @cached_property
    def lines(self) -> list[str]:
        """Non-empty lines, stripped of whitespace."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Texts between empty lines, stripped of whitespace."""
        return [paragraph for paragraph in map(str.strip, _BLANK_LINES.split(self.text)) if paragraph]

    @cached_property
    def ends(self) -> np.ndarray:
        """Number of characters before each word, and in total, without spaces, int64."""
        return np.cumsum([0, *map(len, self.words)])

    @cached_property
    def word_ids(self) -> np.ndarray:
        """Number of each word in the vocabulary of the text, int64."""
        ids = {word: i for i, word in enumerate(dict.fromkeys(self.words))}
        return np.fromiter(map(ids.__getitem__, self.words), np.int64, len(self.words))

    def repeats(self, n: int) -> Repeats:
        """Returns the n-grams that occur more than once; they extend (n-1)-grams that do."""
        if n not in self._repeats:
            before = self.repeats(n - 1) if n > 2 else self._all_words()
            self._repeats[n] = self._longer(before, n) if len(before.ids) else before
        return self._repeats[n]

    def _all_words(self) -> Repeats:
        return Repeats(self.word_ids, np.arange(len(self.words)), np.zeros(0, bool))

    def _longer(self, before: Repeats, n: int) -> Repeats:
        fits = before.starts <= len(self.words) - n
        starts = before.starts[fits]
        # Exact keys, not hashes: both numbers are smaller than the number of words.
        keys = before.ids[fits] * len(self.words) + self.word_ids[starts + (n - 1)]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        is_repeat = np.zeros(len(keys) + 1, bool)
        is_repeat[1:-1] = keys[1:] == keys[:-1]
        (indices,) = np.nonzero(is_repeat[:-1] | is_repeat[1:])
        is_repeat = is_repeat[indices]
        return Repeats(np.cumsum(~is_repeat) - 1, starts[order[indices]], is_repeat)


def word_count(parts: TextParts) -> float:
    """Returns the number of words."""
    return len(parts.words)


def mean_word_length(parts: TextParts) -> float:
    """Returns the characters per word; NaN without words, or if most are characters of a script without spaces."""
    if has_unspaced(parts.text) and 2 * len(_HAS_UNSPACED.findall(parts.text)) > len(parts.words):
        return math.nan
    return float(parts.ends[-1]) / len(parts.words) if parts.words else math.nan


def hash_ratio(parts: TextParts) -> float:
    """Returns the hash signs per word."""
    return parts.text.count("#") / max(len(parts.words), 1)


def ellipsis_ratio(parts: TextParts) -> float:
    """Returns the ellipses, of three dots or one character, per word."""
    return sum(map(parts.text.count, _ELLIPSES)) / max(len(parts.words), 1)


def bullet_fraction(parts: TextParts) -> float:
    """Returns the fraction of lines that start with a bullet."""
    return sum(line.startswith(_BULLETS) for line in parts.lines) / max(len(parts.lines), 1)


def ellipsis_fraction(parts: TextParts) -> float:
    """Returns the fraction of lines that end with an ellipsis."""
    return sum(line.endswith(_ELLIPSES) for line in parts.lines) / max(len(parts.lines), 1)


def alphabetic_fraction(parts: TextParts) -> float:
    """Returns the fraction of words with an alphabetic character; NaN without words."""
    if not parts.words:
        return math.nan
    return sum(word.isalpha() or _LETTER.search(word) is not None for word in parts.words) / len(parts.words)


def stop_words(parts: TextParts) -> float:
    """Returns how many of eight English stop words a text has, at most two; NaN if most letters are not Latin.

    The exception is not Gopher's, whose text is English: without it, documents in other scripts would all be dropped.
    """
    lower = parts.text.lower()
    count = sum(1 for _ in islice(filter(None, (word.search(lower) for word in _STOP_WORDS)), 2))
    return count if count == 2 or dominant_script(parts.text) in ("latin", "none") else math.nan


def duplicate_fraction(pieces: list[str]) -> float:
    """Returns the fraction of pieces that repeat an earlier one."""
    return (len(pieces) - len(set(pieces))) / max(len(pieces), 1)


def duplicate_characters(pieces: list[str]) -> float:
    """Returns the fraction of characters in pieces that repeat an earlier one."""
    total = sum(map(len, pieces))
    return (total - sum(map(len, set(pieces)))) / max(total, 1)


def top_ngram_characters(parts: TextParts, n: int) -> float:
    """Returns the fraction of the characters of words that are in the most frequent n-gram of words.

    N-grams that occur once do not count; of several that are equally frequent, the one with most characters counts.
    """
    ids, starts, is_repeat = parts.repeats(n)
    if not len(ids):
        return 0.0
    # An occurrence that overlaps the one before it adds only its new words.
    fresh = starts.copy()
    fresh[1:] = np.where(is_repeat[1:], np.maximum(starts[1:], starts[:-1] + n), starts[1:])
    characters = np.bincount(ids, weights=parts.ends[starts + n] - parts.ends[fresh])
    counts = np.bincount(ids)
    return float(characters[counts == counts.max()].max() / parts.ends[-1])


def duplicate_ngram_characters(parts: TextParts, n: int) -> float:
    """Returns the fraction of the characters of words that are in n-grams that repeat an earlier one."""
    repeats = parts.repeats(n)
    if not len(repeats.ids):
        return 0.0
    starts = repeats.starts[repeats.is_repeat]
    size = len(parts.words) + 1
    depth = np.cumsum(np.bincount(starts, minlength=size) - np.bincount(starts + n, minlength=size))
    return float(np.diff(parts.ends)[depth[:-1] > 0].sum() / parts.ends[-1])


# Unicode names its letters by script: LATIN SMALL LETTER A.
_SCRIPT_WORDS = {
    "CJK": "han",
    "IDEOGRAPHIC": "han",
    "HIRAGANA": "japanese",
    "KATAKANA": "japanese",
    "HANGUL": "korean",
}
for _name in (
    *("latin", "cyrillic", "greek", "arabic", "hebrew", "armenian", "georgian", "ethiopic", "syriac", "thaana"),
    *("devanagari", "bengali", "gurmukhi", "gujarati", "oriya", "tamil", "telugu", "kannada", "malayalam", "sinhala"),
    *("thai", "lao", "tibetan", "myanmar", "khmer", "mongolian"),
):
    _SCRIPT_WORDS[_name.upper()] = _name
SCRIPTS = (*dict.fromkeys(_SCRIPT_WORDS.values()), "other", "none")


@cache
def script(character: str) -> str:
    """Returns the script of a letter, or "" if the character is not a letter."""
    if not character.isalpha():
        return ""
    name = re.split("[ -]", unicodedata.name(character, ""))[:2]  # the second of HALFWIDTH KATAKANA LETTER A
    return next((_SCRIPT_WORDS[word] for word in name if word in _SCRIPT_WORDS), "other")


def dominant_script(text: str) -> str:
    """Returns the script, one of SCRIPTS, of most letters, or "none" without letters.

    Han characters count as Japanese if at least a tenth of Han and kana characters are kana.
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[script(character)] += count
    del counts[""]
    if counts["japanese"] * 10 >= counts["japanese"] + counts["han"]:
        counts["japanese"] += counts.pop("han", 0)
    return max(SCRIPTS, key=lambda name: counts[name]) if counts.total() else "none"


class Rule(NamedTuple):
    """Limits of a measure, and the reason for dropping a document outside of them."""

    reason: str
    measure: Callable[[TextParts], float]
    minimum: float = -math.inf
    maximum: float = math.inf


def failed_rules(rules: Iterable[Rule], text: str) -> Iterator[str]:
    """Iterates over the reasons of the rules that a text fails, measuring lazily."""
    parts = TextParts(text)
    for rule in rules:
        measured = rule.measure(parts)
        if measured < rule.minimum or measured > rule.maximum:  # false for NaN
            yield rule.reason


def length_rules(min_words: int, max_words: int) -> tuple[Rule, ...]:
    """Returns Gopher's rules on length."""
    return (
        Rule(f"fewer than {min_words} words", word_count, minimum=min_words),
        Rule(f"more than {max_words} words", word_count, maximum=max_words),
        Rule("mean word length below 3", mean_word_length, minimum=3),
        Rule("mean word length above 10", mean_word_length, maximum=10),
    )


QUALITY = (
    Rule("more than 0.1 hash signs a word", hash_ratio, maximum=0.1),
    Rule("more than 0.1 ellipses a word", ellipsis_ratio, maximum=0.1),
    Rule("more than 90% of lines start with a bullet", bullet_fraction, maximum=0.9),
    Rule("more than 30% of lines end with an ellipsis", ellipsis_fraction, maximum=0.3),
    Rule("fewer than 80% of words have a letter", alphabetic_fraction, minimum=0.8),
    Rule("fewer than 2 English stop words", stop_words, minimum=2),
)

TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
REPETITION = (  # table A1
    Rule("more than 30% duplicate lines", lambda parts: duplicate_fraction(parts.lines), maximum=0.30),
    Rule("more than 30% duplicate paragraphs", lambda parts: duplicate_fraction(parts.paragraphs), maximum=0.30),
    Rule(
        "more than 20% of characters in duplicate lines", lambda parts: duplicate_characters(parts.lines), maximum=0.20
    ),
    Rule(
        "more than 20% of characters in duplicate paragraphs",
        lambda parts: duplicate_characters(parts.paragraphs),
        maximum=0.20,
    ),
    *(
        Rule(
            f"more than {maximum:.0%} of characters in the top {n}-gram",
            partial(top_ngram_characters, n=n),
            maximum=maximum,
        )
        for n, maximum in TOP_NGRAMS.items()
    ),
    *(
        Rule(
            f"more than {maximum:.0%} of characters in duplicate {n}-grams",
            partial(duplicate_ngram_characters, n=n),
            maximum=maximum,
        )
        for n, maximum in DUPLICATE_NGRAMS.items()
    ),
)
