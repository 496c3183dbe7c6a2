"""Converts tokenizers of the `tokenizers` library to `tiktoken.Encoding`s, if these provably give the same ids."""

import json
import random
import sys
from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any

from gptjax.core import console
from gptjax.data.tokenizers.hf_tokenizer import ALPHABET, HFTokenizer, describe, to_bytes
from gptjax.data.tokenizers.tokenizers import ONE_CHARACTER, Encoding

# Pattern of the library's ByteLevel if no other pre-tokenizer has split the text.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Inexact(Exception):
    """Reason that no `tiktoken.Encoding` gives the ids of the library."""


def exact_encoding(library: HFTokenizer) -> Encoding:
    """Returns the `tiktoken.Encoding` that gives the same ids as the library for every text.

    Both split text into pieces by a pattern, and merge the bytes of a piece pair by pair: the lowest rank first, the
    leftmost of several. tiktoken may merge every pair whose concatenation is a token, and the rank is the id of that
    token; the library only merges the pairs in its list, in the order of the list. Inside a span whose borders no merge
    has crossed, merging proceeds as on that span alone. So if a pair whose concatenation is the token t is ever
    adjacent, it is the last pair of merging the bytes of t: each token has one such pair or none, and the two agree on
    every piece if the library lists each of these pairs, in the order of the ids. A token without such a pair occurs
    only as a whole piece, which tiktoken always looks up first, and the library if `ignore_merges` is set.

    That the two regex engines agree on the pattern is tested, not proved: both split a text of many contexts.

    Raises:
      Inexact: there is no such encoding, or it cannot be proved.
    """
    description = json.loads(library.text)
    pattern = _pattern(description)
    model = description["model"]
    special, ranks = _vocabulary(library, model)
    by_bytes = {to_bytes(token): rank for token, rank in ranks.items()}
    name = library.name
    if ranks.keys() >= set(ALPHABET):
        _check_merges(ranks, special, model)
    elif _is_alphabet(by_bytes, pattern, model):
        name = "chars"  # which refuses a text with other characters, where the library would drop them
    else:
        raise Inexact("its vocabulary lacks some of the 256 bytes")
    facts: dict[str, Any] = {"mergeable_ranks": by_bytes, "special_tokens": special}
    try:
        encoding = Encoding(name, pat_str=pattern, **facts, begin=library.begin, end=library.end)
    except ValueError as error:
        raise Inexact(f"tiktoken cannot read its pattern: {' '.join(str(error).split())}") from error
    check_pattern(pattern, description)
    _check_names(encoding, library)
    return encoding


def _pattern(description: dict[str, Any]) -> str:
    # Returns the pattern by which tiktoken splits text into pieces.
    normalizers = _parts(description.get("normalizer"), "normalizers")
    if normalizers:
        raise Inexact(f"the normalizer {_kinds(normalizers)} has no counterpart in tiktoken")
    steps = _parts(description.get("pre_tokenizer"), "pretokenizers")
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return pattern
    if any(step.get("add_prefix_space") for step in steps):
        raise Inexact("it puts a space before each text")
    raise Inexact(f"the pre-tokenizer {_kinds(steps) or 'none'} has no counterpart in tiktoken")


def _parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    return (part[name] if part.get("type") == "Sequence" else [part]) if part else []


def _kinds(parts: list[dict[str, Any]]) -> str:
    return " + ".join(part.get("type", "of no type") for part in parts)


def _vocabulary(library: HFTokenizer, model: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    # Returns ids of special tokens by name, and of all others by their spelling in ALPHABET.
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise Inexact(f"its model is {model.get('type', 'no BPE')}, and tiktoken has BPE only")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Inexact(f"its {key} is {model[key]!r}, for which tiktoken has no counterpart")
    added = library.library.get_added_tokens_decoder()
    cut = [token.content for token in added.values() if not token.special]
    if cut:
        raise Inexact(f"its added token {cut[0]!r} is cut out of ordinary text, as tiktoken never does")
    context_dependent = [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]
    if context_dependent:
        raise Inexact(
            f"whether its special token {context_dependent[0]!r} is one depends on the text beside it, or "
            "takes blanks of it"
        )
    special = {token.content: token_id for token_id, token in added.items()}
    vocabulary = library.library.get_vocab(with_added_tokens=False)
    ranks = {token: rank for token, rank in vocabulary.items() if token not in special}
    foreign = set().union(*ranks) - set(ALPHABET)
    if foreign:
        raise Inexact(f"its vocabulary is not written in bytes: {min(foreign)!r} is not a byte")
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise Inexact("two of its tokens have the same id")
    return special, ranks


def _is_alphabet(ranks: dict[bytes, int], pattern: str, model: dict[str, Any]) -> bool:
    # Returns True if each token is one character, and each character of a text is looked up whole.
    characters = {token: token.decode(errors="ignore") for token in ranks}
    single = all(len(c) == 1 and c.encode() == token for token, c in characters.items())
    lookup = model.get("ignore_merges") and not model.get("unk_token") and not model.get("byte_fallback")
    return bool(ranks and single and lookup and pattern == ONE_CHARACTER)


def _check_merges(ranks: dict[str, int], special: dict[str, int], model: dict[str, Any]) -> None:
    # See `exact_encoding`.
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    position = {pair: i for i, pair in enumerate(merges)}
    merged = next((left + right for left, right in merges if left + right in special), None)
    if merged is not None:
        raise Inexact(f"it merges ordinary text into the special token {merged!r}")
    last = -1
    for token, parts in splits(ranks):
        if parts is None:
            if not model.get("ignore_merges"):
                raise Inexact(f"tiktoken looks up the whole word {token!r}, which the library's merges do not make")
        elif parts not in position:
            raise Inexact(f"tiktoken merges {parts[0]!r} and {parts[1]!r}, which is not among the library's merges")
        elif position[parts] < last:
            raise Inexact(f"its merges are not in the order of their ids: {parts[0]!r} and {parts[1]!r} come too early")
        else:
            last = position[parts]


def splits(ranks: dict[str, int]) -> Iterable[tuple[str, tuple[str, str] | None]]:
    """Iterates over tokens longer than a byte, lowest rank first, and the last pair of merging their bytes, if any.

    Args:
      ranks: ranks of tokens written in ALPHABET.
    """
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    with console.bar("checking the tokenizer", len(tokens)) as advance:
        for n, token in enumerate(tokens):
            yield token, _split(token, ranks)
            if n % 1000 == 999:
                advance(1000)


def _split(token: str, ranks: dict[str, int]) -> tuple[str, str] | None:
    unmergeable = sys.maxsize
    parts = list(token)
    pairs = [ranks.get(token[i : i + 2], unmergeable) for i in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest == unmergeable:
            return None
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], unmergeable)
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], unmergeable)
    return parts[0], parts[1]


def _check_names(encoding: Encoding, library: HFTokenizer) -> None:
    # Checks that names of special tokens are plain text, although the library has them in its vocabulary.
    for name in encoding._special_tokens:
        for text in (side + name + side for side in ("", " ", "x", "\n")):
            if encoding.encode_ordinary(text) != library.encode_ordinary(text):
                raise Inexact(f"it takes the text {name!r} for a special token")


def check_pattern(pattern: str, description: dict[str, Any]) -> None:
    """Raises Inexact unless tiktoken splits by the pattern as the library does by a `tokenizer.json`."""
    text = _cut_differently(pattern, json.dumps(description["pre_tokenizer"]))
    if text is not None:
        raise Inexact(f"tiktoken cuts {text[:40]!r} in other places by the same pattern")


@cache
def _cut_differently(pattern: str, pre_tokenizer: str) -> str | None:
    # Returns a text that tiktoken and the library split differently, or None. The vocabulary has all pairs of bytes, so
    # that ids differ where only one of them splits: pairs across characters are merged first, in any order.
    pairs = list(product(ALPHABET, repeat=2))
    random.Random(0).shuffle(pairs)
    within = set(ALPHABET[0x80:0xC0])
    pairs.sort(key=lambda pair: pair[1] in within)
    ranks = {token: rank for rank, token in enumerate([*ALPHABET, *map("".join, pairs)])}
    library = HFTokenizer(json.dumps(describe(ranks, pairs, {}, pre_tokenizer=json.loads(pre_tokenizer))), "")
    by_bytes = {to_bytes(token): rank for token, rank in ranks.items()}
    encoding = Encoding("", pat_str=pattern, mergeable_ranks=by_bytes, special_tokens={})

    def differ(text: str) -> bool:
        return encoding.encode_ordinary(text) != library.encode_ordinary(text)

    wrong = next(filter(differ, _contexts()), None)
    return wrong and next(filter(differ, wrong.split("\n")), wrong)


def _contexts() -> list[str]:
    # All characters of the first two planes, those of small scripts beside a few others; the classes that patterns
    # distinguish, in every order; English contractions; and ends of texts.
    small = [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000)]
    large = [*range(0x3400, 0xD800), *range(0xE000, 0x20000)]
    kinds = ["a", "S", "\u017f", "\u0301", "再", "1", " ", "\t", "\n", "\r", "\u00a0", "!", "'", "🤖"]
    ends = ["s", "S", "\u017f", "t", "T", "re", "RE", "ve", "m", "ll", "LL", "d", "x"]
    return [
        "".join(f"a{c}1 {c}{c}\n'{c}" for c in map(chr, small)),
        "".join(map(chr, large)),
        "".join(map("".join, product(kinds, repeat=4))),
        "\n".join(f"a{quote}{end}b {quote}{end}" for quote in "'\u2019" for end in ends),
        *("x" + "".join(blanks) for n in range(4) for blanks in product(" \t\n\r\u3000", repeat=n)),
    ]
