"""Tokenizers out of Hugging Face model folders and into them.

A folder's tokenizer becomes a `tiktoken.Encoding` where that gives the same ids for every text, which is shown and
not assumed; else the `tokenizers` library runs it.
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from functools import cache
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from gptjax import console
from gptjax.config import ConfigError, DataError
from gptjax.data.library_tokenizer import ALPHABET, LibraryTokenizer, byte_level, describe, to_bytes
from gptjax.data.tokenizers import END_OF_TEXT, ONE_CHARACTER, Encoding, Tokenizer
from gptjax.files import write_atomic

# What the library's ByteLevel cuts by where nothing has cut before.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Inexact(Exception):
    """Why no `tiktoken.Encoding` gives the ids that the library gives."""


def read(folder: Path) -> tuple[Encoding | LibraryTokenizer, str] | None:
    """The tokenizer of a model folder, and which kind it became and why; None where the folder has none.

    Args:
      folder: has `tokenizer.json`, or `vocab.json` and `merges.txt`; `tokenizer_config.json`, `config.json` and
        `generation_config.json` say what documents begin and end with.

    Raises:
      DataError: damaged files, or only ones of another format.
    """
    settings = _object(folder / "tokenizer_config.json")
    text = _description(folder, settings)
    if text is None:
        return None
    try:
        library = LibraryTokenizer(text, f"hf:{folder.resolve().name}")
    except ValueError as error:
        raise DataError(f"the tokenizer in {folder} cannot be read: {error}") from error
    library.begin, library.end = _begin(library, settings), _end(library, settings, folder)
    try:
        encoding = exact_encoding(library)
    except Inexact as why:
        return library, f"tokenizers library: {why}"
    return encoding, "tiktoken.Encoding, exact: every merge agrees"


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `read` and transformers' AutoTokenizer read.

    Raises:
      ConfigError: the library would give other ids for some text.
    """
    try:
        text = tokenizer.text if isinstance(tokenizer, LibraryTokenizer) else _text_of(tokenizer)
        library = LibraryTokenizer(text, tokenizer.name, tokenizer.begin, tokenizer.end)
        if isinstance(tokenizer, Encoding):
            exact_encoding(library)
            _check_pattern(tokenizer._pat_str, json.loads(text))
    except (ValueError, Inexact) as error:
        raise ConfigError(f"the tokenizer {tokenizer.name} cannot be written for Hugging Face: {error}") from error
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token in (("bos_token", (*tokenizer.begin, None)[0]), ("eos_token", tokenizer.end)):
        if token is not None:
            settings[key] = library.library.id_to_token(token)
    if tokenizer.begin != _begin(library, {}):
        settings["add_bos_token"] = bool(tokenizer.begin)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "tokenizer.json", text)
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def exact_encoding(library: LibraryTokenizer) -> Encoding:
    """The `tiktoken.Encoding` that gives the same ids as the library for every text.

    Both cut text into pieces by a pattern, and merge the bytes of a piece pair by pair: the lowest rank first, the
    leftmost of several. tiktoken may merge every pair whose whole is a token, and its rank is that token's id; the
    library only the pairs in its list, in the order of the list. Inside a span whose borders no merge has crossed,
    merging goes as it would on that span alone. So if ever a pair is adjacent whose whole is the token t, it is the
    pair that merging t's own bytes comes to: each token has one such pair or none, and the two agree on every piece if
    the library lists each of these pairs, in the order of their wholes' ids. A token without such a pair is met only
    as a whole piece, which tiktoken always looks up first, and the library where `ignore_merges` is set.

    Whether the two regex engines read the pattern alike is no matter of proof: both cut a text of many contexts.

    Raises:
      Inexact: there is none, or it cannot be shown.
    """
    described = json.loads(library.text)
    pattern = _pattern(described)
    model = described["model"]
    special, ranks = _vocabulary(library, model)
    by_bytes = {to_bytes(token): rank for token, rank in ranks.items()}
    name = library.name
    if ranks.keys() >= set(ALPHABET):
        _check_merges(ranks, special, model)
    elif _is_alphabet(by_bytes, pattern, model):
        name = "chars"  # which refuses a text with other characters, where the library would leave them out
    else:
        raise Inexact("its vocabulary lacks some of the 256 bytes")
    facts: dict[str, Any] = {"mergeable_ranks": by_bytes, "special_tokens": special}
    try:
        encoding = Encoding(name, pat_str=pattern, **facts, begin=library.begin, end=library.end)
    except ValueError as error:
        raise Inexact(f"tiktoken cannot read its pattern: {' '.join(str(error).split())}") from error
    _check_pattern(pattern, described)
    _check_names(encoding, library)
    return encoding


def _pattern(described: dict[str, Any]) -> str:
    # How tiktoken would cut text into pieces.
    normalizers = _parts(described.get("normalizer"), "normalizers")
    if normalizers:
        raise Inexact(f"the normalizer {_kinds(normalizers)} has no counterpart in tiktoken")
    steps = _parts(described.get("pre_tokenizer"), "pretokenizers")
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


def _vocabulary(library: LibraryTokenizer, model: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    # Ids of special tokens by name, and of all others by what stands for their bytes.
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise Inexact(f"its model is {model.get('type', 'no BPE')}, and tiktoken has BPE only")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Inexact(f"its {key} is {model[key]!r}, for which tiktoken has no counterpart")
    added = library.library.get_added_tokens_decoder()
    cut = [token.content for token in added.values() if not token.special]
    if cut:
        raise Inexact(f"its added token {cut[0]!r} is cut out of ordinary text, as tiktoken never does")
    special = {token.content: token_id for token_id, token in added.items()}
    vocabulary = library.library.get_vocab(with_added_tokens=False)
    ranks = {token: rank for token, rank in vocabulary.items() if token not in special}
    foreign = set().union(*ranks) - set(ALPHABET)
    if foreign:
        raise Inexact(f"its vocabulary is not written in bytes: {min(foreign)!r} stands for none")
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise Inexact("two of its tokens have the same id")
    return special, ranks


def _is_alphabet(ranks: dict[bytes, int], pattern: str, model: dict[str, Any]) -> bool:
    # Whether each token is one character, and each character of a text is looked up whole.
    characters = {token: token.decode(errors="ignore") for token in ranks}
    single = all(len(c) == 1 and c.encode() == token for token, c in characters.items())
    lookup = model.get("ignore_merges") and not model.get("unk_token") and not model.get("byte_fallback")
    return bool(ranks and single and lookup and pattern == ONE_CHARACTER)


def _check_merges(ranks: dict[str, int], special: dict[str, int], model: dict[str, Any]) -> None:
    # See `exact_encoding`.
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    position = {pair: i for i, pair in enumerate(merges)}
    whole = next((left + right for left, right in merges if left + right in special), None)
    if whole is not None:
        raise Inexact(f"it merges ordinary text into the special token {whole!r}")
    last = -1
    for token, parts in _splits(ranks):
        if parts is None:
            if not model.get("ignore_merges"):
                raise Inexact(f"tiktoken looks up the whole word {token!r}, which the library's merges do not make")
        elif parts not in position:
            raise Inexact(f"tiktoken merges {parts[0]!r} and {parts[1]!r}, which is not among the library's merges")
        elif position[parts] < last:
            raise Inexact(f"its merges are not in the order of their ids: {parts[0]!r} and {parts[1]!r} come too early")
        else:
            last = position[parts]


def _splits(ranks: dict[str, int]) -> Iterable[tuple[str, tuple[str, str] | None]]:
    # Each token longer than a byte, lowest rank first, and the two parts that merging its own bytes comes to, if any.
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    with console.bar("checking the tokenizer", len(tokens)) as advance:
        for n, token in enumerate(tokens):
            yield token, _split(token, ranks)
            if n % 1000 == 999:
                advance(1000)


def _split(token: str, ranks: dict[str, int]) -> tuple[str, str] | None:
    never = sys.maxsize
    parts = list(token)
    pairs = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest == never:
            return None
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], never)
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], never)
    return parts[0], parts[1]


def _check_names(encoding: Encoding, library: LibraryTokenizer) -> None:
    # That names of special tokens are plain text, although the library has them in its vocabulary.
    for name in encoding._special_tokens:
        for text in (side + name + side for side in ("", " ", "x", "\n")):
            if encoding.encode_ordinary(text) != library.encode_ordinary(text):
                raise Inexact(f"it takes the text {name!r} for a special token")


def _check_pattern(pattern: str, described: dict[str, Any]) -> None:
    # That tiktoken cuts by the pattern where the library cuts.
    text = _cut_differently(pattern, json.dumps(described["pre_tokenizer"]))
    if text is not None:
        raise Inexact(f"tiktoken cuts {text[:40]!r} in other places by the same pattern")


@cache
def _cut_differently(pattern: str, pre_tokenizer: str) -> str | None:
    # A text that tiktoken by the pattern, and the library by the pre-tokenizer, cut differently; None where there is
    # none. The vocabulary has all pairs of bytes, so that where only one of them cuts, ids differ: pairs across
    # characters are merged first, in any order.
    pairs = list(product(ALPHABET, repeat=2))
    random.Random(0).shuffle(pairs)
    within = set(ALPHABET[0x80:0xC0])
    pairs.sort(key=lambda pair: pair[1] in within)
    ranks = {token: rank for rank, token in enumerate([*ALPHABET, *map("".join, pairs)])}
    library = LibraryTokenizer(json.dumps(describe(ranks, pairs, {}, pre_tokenizer=json.loads(pre_tokenizer))), "")
    by_bytes = {to_bytes(token): rank for token, rank in ranks.items()}
    encoding = Encoding("", pat_str=pattern, mergeable_ranks=by_bytes, special_tokens={})

    def differ(text: str) -> bool:
        return encoding.encode_ordinary(text) != library.encode_ordinary(text)

    wrong = next(filter(differ, _contexts()), None)
    return wrong and next(filter(differ, wrong.split("\n")), wrong)


def _contexts() -> list[str]:
    # Every character of the first two planes, those of small scripts beside a few others; what patterns tell apart, in
    # every order; English contractions; and ends of texts.
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


def _description(folder: Path, settings: dict[str, Any]) -> str | None:
    # The content of the folder's tokenizer.json, or of the one that its other files amount to.
    if (folder / "tokenizer.json").exists():
        return _read(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return json.dumps(_of_merges(folder, settings))
    other = [path.name for name in ("*.model", "vocab.txt", "vocab.json", "merges.txt") for path in folder.glob(name)]
    if other:
        raise DataError(
            f"{folder} has its tokenizer only as {other[0]}; let transformers write a tokenizer.json there, with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or give --tokenizer=NAME"
        )
    return None


def _of_merges(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    # `vocab.json` and `merges.txt` as a tokenizer.json: GPT-1's where config.json says so, else GPT-2's.
    added = _object(folder / "added_tokens.json")
    vocabulary = _object(folder / "vocab.json") | added
    if not all(isinstance(token, int) for token in vocabulary.values()):
        raise DataError(f"{folder / 'vocab.json'} is damaged: its ids are not all whole numbers")
    lines = _read(folder / "merges.txt").replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong:
        raise DataError(f"{folder / 'merges.txt'} is damaged: {' '.join(wrong)[:40]!r} is no pair")
    names = _special_names(settings) | _special_names(_object(folder / "special_tokens_map.json"))
    if _object(folder / "config.json").get("model_type") == "openai-gpt":
        names |= {"<unk>"}
        parts = {
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
            | {"strip_accents": None, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
            "model": {"unk_token": "<unk>", "end_of_word_suffix": "</w>"},
        }
    else:
        names |= {END_OF_TEXT}
        if not vocabulary.keys() >= set(ALPHABET):
            raise DataError(f"{folder / 'vocab.json'} lacks some of the 256 bytes, so it is not of GPT-2's kind")
        parts = {"pre_tokenizer": byte_level(use_regex=True, add_prefix_space=bool(settings.get("add_prefix_space")))}
    tokens = {name: name in names for name in vocabulary if name in names or name in added}
    return describe(vocabulary, merges, tokens, **parts)


def _special_names(settings: dict[str, Any]) -> set[str]:
    named = [settings.get(key) for key in SPECIAL] + list(settings.get("additional_special_tokens") or [])
    named += [token for token in (settings.get("added_tokens_decoder") or {}).values() if token.get("special")]
    return {name for token in named if (name := _name(token))}


def _name(token: Any) -> str | None:
    # Of a special token in a tokenizer_config.json: a string, or an object with flags that matter to parsing only.
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _begin(library: LibraryTokenizer, settings: dict[str, Any]) -> tuple[int, ...]:
    # What the library puts before a text when it is to add special tokens, unless the settings say otherwise.
    wanted = settings.get("add_bos_token")
    encoded = library.library.encode("a", add_special_tokens=True)
    added = takewhile(lambda pair: pair[1], zip(encoded.ids, encoded.special_tokens_mask, strict=True))
    begin = () if wanted is False else tuple(token for token, _ in added)
    named = library.library.token_to_id(_name(settings.get("bos_token")) or "")
    return (named,) if wanted and not begin and named is not None else begin


def _end(library: LibraryTokenizer, settings: dict[str, Any], folder: Path) -> int | None:
    named = library.library.token_to_id(_name(settings.get("eos_token")) or "")
    if named is not None:
        return named
    for file in ("config.json", "generation_config.json"):
        token = _object(folder / file).get("eos_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < library.n_vocab:  # some folders name the id of another vocabulary
            return token
    added = library.library.get_added_tokens_decoder()
    return next((token for token, known in added.items() if known.content == END_OF_TEXT), None)


def _text_of(encoding: Tokenizer) -> str:
    # The tokenizer.json of an encoding. Its special tokens are in the vocabulary too, or the library would number them.
    assert isinstance(encoding, Encoding), encoding
    ranks = {"".join(ALPHABET[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()}
    special = encoding._special_tokens
    if not ranks.keys().isdisjoint(special):
        raise Inexact(f"{min(ranks.keys() & special)!r} is both a special token and ordinary")
    splits = dict(_splits(ranks))
    merges = [parts for parts in splits.values() if parts and parts[0] in ranks and parts[1] in ranks]
    # Possessive counts mean something else to Oniguruma; whether plain ones do as well is compared afterwards.
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", encoding._pat_str)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}
    names = {rank: token for token, rank in (ranks | special).items()}
    begin = [(names[token], token) for token in encoding.begin]
    return json.dumps(
        describe(
            ranks | special,
            merges,
            dict.fromkeys(special, True),
            pre_tokenizer=pre_tokenizer,
            post_processor=_template(begin) if begin else None,
            model={"ignore_merges": len(merges) < len(splits)},
        ),
        ensure_ascii=False,
    )


def _template(begin: list[tuple[str, int]]) -> dict[str, Any]:
    # A post-processor that puts the tokens before each text.
    def one(sequence: str, kind: int) -> list[Any]:
        before = [{"SpecialToken": {"id": name, "type_id": kind}} for name, _ in begin]
        return [*before, {"Sequence": {"id": sequence, "type_id": kind}}]

    tokens = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in begin}
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": tokens,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    # The object in a file of JSON; empty where there is no such file.
    if not path.exists():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds no object")
    return content
