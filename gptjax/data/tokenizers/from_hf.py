"""Reads tokenizers from Hugging Face model folders and writes them.

The tokenizer of a folder becomes a `tiktoken.Encoding` if that provably gives the same ids for every text; otherwise
the `tokenizers` library runs it.
"""

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import files, hub
from gptjax.core.files import write_atomic
from gptjax.data.tokenizers import wordpiece
from gptjax.data.tokenizers.exactness import Inexact, check_pattern, exact_encoding, splits
from gptjax.data.tokenizers.hf_tokenizer import ALPHABET, HFTokenizer, byte_level, describe
from gptjax.data.tokenizers.tokenizers import END_OF_TEXT, Encoding, Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Types of values in `tokenizer_config.json` that are not null.
SETTINGS: dict[str, type] = {
    "additional_special_tokens": list, "added_tokens_decoder": dict, "add_bos_token": bool, "add_prefix_space": bool,
    "do_lower_case": bool, "tokenize_chinese_chars": bool, "strip_accents": bool,
}  # fmt: skip
JSON_NAMES = {list: "list", dict: "object", bool: "true or false"}


def read(folder: Path) -> tuple[Encoding | HFTokenizer, str] | None:
    """Reads the tokenizer of a model folder.

    Args:
      folder: has `tokenizer.json`, or `vocab.json` and `merges.txt`, or BERT's `vocab.txt`; `tokenizer_config.json`,
        `config.json` and `generation_config.json` determine begin and end ids.

    Returns:
      the tokenizer, and a message on its type and the reason for it; None if the folder has no tokenizer.

    Raises:
      DataError: the files are damaged, or have another format.
    """
    settings = _settings(folder / "tokenizer_config.json")
    text = _description(folder, settings)
    if text is None:
        return None
    try:
        library = HFTokenizer(text, f"hf:{folder.resolve().name}")
    except ValueError as error:
        raise DataError(f"the tokenizer in {folder} cannot be read: {error}") from error
    library.begin, library.end = _begin(library, settings), _end(library, settings, folder)
    library.stop_token_ids = _stop_token_ids(library, folder)
    try:
        encoding = exact_encoding(library)
    except Inexact as why:
        return library, f"tokenizers library: {why}"
    encoding.stop_token_ids = library.stop_token_ids
    return encoding, "tiktoken.Encoding, exact: every merge agrees"


def write(tokenizer: Tokenizer, folder: Path, closes: bool = False) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `read` and transformers' AutoTokenizer read.

    Args:
      tokenizer: tokenizer of a run.
      folder: destination.
      closes: if True, the end id is added after each text, as encoders read it.

    Raises:
      ConfigError: the library would give other ids for some text.
    """
    try:
        text = tokenizer.text if isinstance(tokenizer, HFTokenizer) else _to_json(tokenizer, closes)
        library = HFTokenizer(text, tokenizer.name, tokenizer.begin, tokenizer.end)
        if isinstance(tokenizer, Encoding):
            exact_encoding(library)
            check_pattern(tokenizer._pat_str, json.loads(text))
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


def chat_template(folder: Path) -> str | None:
    """Reads the chat template, Jinja source, of a model folder; None if there is none.

    It is `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`: a text, or a list with a "default".

    Raises:
      DataError: it cannot be read.
    """
    if (folder / "chat_template.jinja").exists():
        return _read(folder / "chat_template.jinja")
    template = _settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / 'tokenizer_config.json'} is damaged: its chat_template is not text")
    return template


def special_names(folder: Path) -> dict[str, str]:
    """Reads the special tokens of a model folder by variable of its chat template: {"bos_token": "<s>", ...}."""
    settings = _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")
    names = {key: _name(settings.get(key)) for key in SPECIAL}
    return {key: name for key, name in names.items() if name}


def _description(folder: Path, settings: dict[str, Any]) -> str | None:
    # Returns the content of tokenizer.json, or an equivalent one made from the other files.
    if (folder / "tokenizer.json").exists():
        return _read(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return json.dumps(_from_merges(folder, settings))
    if (folder / "vocab.txt").exists():
        return json.dumps(wordpiece.describe(_read(folder / "vocab.txt"), settings))
    if (folder / "source.spm").exists():
        raise DataError(
            f"{folder} has its tokenizer only as two models of sentencepiece, source.spm and target.spm, which gptjax "
            "cannot read; put a tokenizer.json of the same ids there, or give --tokenizer=NAME"
        )
    other = [path.name for name in ("*.model", "vocab.json", "merges.txt") for path in folder.glob(name)]
    if other:
        raise DataError(
            f"{folder} has its tokenizer only as {other[0]}; let transformers write a tokenizer.json there, with "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or give --tokenizer=NAME"
        )
    return None


def _from_merges(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    # `vocab.json` and `merges.txt` as a tokenizer.json: GPT-1's where config.json says so, else GPT-2's.
    added = _object(folder / "added_tokens.json")
    vocabulary = _object(folder / "vocab.json") | added
    if not all(isinstance(token, int) for token in vocabulary.values()):
        raise DataError(f"{folder / 'vocab.json'} is damaged: its ids are not all whole numbers")
    lines = _read(folder / "merges.txt").replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong:
        raise DataError(f"{folder / 'merges.txt'} is damaged: {' '.join(wrong)[:40]!r} is not a pair")
    names = _special_names(settings) | _special_names(_settings(folder / "special_tokens_map.json"))
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
    # A special token in tokenizer_config.json is a string, or an object with flags that only matter for parsing.
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _begin(library: HFTokenizer, settings: dict[str, Any]) -> tuple[int, ...]:
    # Ids that the library adds before a text with `add_special_tokens`, unless the settings say otherwise.
    adds_bos = settings.get("add_bos_token")
    encoded = library.library.encode("a", add_special_tokens=True)
    added = takewhile(lambda pair: pair[1], zip(encoded.ids, encoded.special_tokens_mask, strict=True))
    begin = () if adds_bos is False else tuple(token for token, _ in added)
    bos = library.library.token_to_id(_name(settings.get("bos_token")) or "")
    return (bos,) if adds_bos and not begin and bos is not None else begin


def _end(library: HFTokenizer, settings: dict[str, Any], folder: Path) -> int | None:
    eos = library.library.token_to_id(_name(settings.get("eos_token")) or "")
    if eos is not None:
        return eos
    for file in ("config.json", "generation_config.json"):
        for token in _eos_token_ids(folder / file):
            if token < library.n_vocab:  # some folders have the id of another vocabulary
                return token
    added = library.library.get_added_tokens_decoder()
    closing = (_name(settings.get("sep_token")), "[SEP]", END_OF_TEXT)  # BERT's texts end with their separator
    return next((token for token, added_token in added.items() if added_token.content in closing), None)


def _stop_token_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    # Further ids at which transformers ends generation: those of generation_config.json, or of config.json.
    named = _eos_token_ids(folder / "generation_config.json") or _eos_token_ids(folder / "config.json")
    return tuple(sorted({token for token in named if token < tokenizer.n_vocab} - {tokenizer.end}))


def _eos_token_ids(path: Path) -> list[int]:
    value = _object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise DataError(f"{path} is damaged: its eos_token_id is {str(value)[:40]}, no id or list of ids")
    return ids


def _to_json(encoding: Tokenizer, closes: bool) -> str:
    # Returns the tokenizer.json of an encoding. Special tokens are in the vocabulary too, or they would be renumbered.
    assert isinstance(encoding, Encoding), encoding
    ranks = {"".join(ALPHABET[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()}
    special = encoding._special_tokens
    if not ranks.keys().isdisjoint(special):
        raise Inexact(f"{min(ranks.keys() & special)!r} is both a special token and ordinary")
    parted = dict(splits(ranks))
    merges = [parts for parts in parted.values() if parts and parts[0] in ranks and parts[1] in ranks]
    # Possessive counts mean something else in Oniguruma; that plain ones are equivalent is checked afterwards.
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", encoding._pat_str)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}
    names = {rank: token for token, rank in (ranks | special).items()}
    begin = [(names[token], token) for token in encoding.begin]
    after = [(names[encoding.end], encoding.end)] if closes and encoding.end is not None else []
    return json.dumps(
        describe(
            ranks | special,
            merges,
            dict.fromkeys(special, True),
            pre_tokenizer=pre_tokenizer,
            post_processor=_template(begin, after) if begin or after else None,
            model={"ignore_merges": len(merges) < len(parted)},
        ),
        ensure_ascii=False,
    )


def _template(begin: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict[str, Any]:
    # Returns a post-processor that adds the tokens before and after each text.
    def one(sequence: str, kind: int) -> list[Any]:
        before, behind = (
            [{"SpecialToken": {"id": name, "type_id": kind}} for name, _ in side] for side in (begin, after)
        )
        return [*before, {"Sequence": {"id": sequence, "type_id": kind}}, *behind]

    tokens = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in begin + after}
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": tokens,
    }


def _read(path: Path) -> str:
    return files.decode(hub.read_bytes(path), f"{path} cannot be read: it")


def _object(path: Path) -> dict[str, Any]:
    # Returns the object of a JSON file, or {} if there is no such file.
    return hub.read_json(path) if path.exists() else {}


def _settings(path: Path) -> dict[str, Any]:
    # The same for tokenizer_config.json and special_tokens_map.json, checking the types of values.
    settings = _object(path)
    for key, kind in SETTINGS.items():
        if settings.get(key) is not None and not isinstance(settings[key], kind):
            raise DataError(f"{path} is damaged: its {key} is {str(settings[key])[:40]}, no {JSON_NAMES[kind]}")
    tokens = (settings.get("added_tokens_decoder") or {}).values()
    if not all(isinstance(token, dict) for token in tokens):
        raise DataError(f"{path} is damaged: its added_tokens_decoder has a token that is not an object")
    return settings
