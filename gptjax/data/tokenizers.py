"""Tokenizers: text to token ids and back. Each is a `tiktoken.Encoding`; here they are made, saved and loaded.

By name: `bytes`; `chars` (each character of the text); `bpe:N` (byte-level BPE of N ids, trained on the text); and
tiktoken's own, such as `gpt2`. Every one but `chars` ends with `<|endoftext|>`, which stands between documents.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from gptjax import console
from gptjax.config import CheckpointError, ConfigError, DataError
from gptjax.files import write_atomic

if TYPE_CHECKING:
    import tokenizers as hf_tokenizers

END_OF_TEXT = "<|endoftext|>"

# How text is cut before pairs are merged: words with the space before them, numbers of up to three digits, runs of
# punctuation, line ends together with the indentation that follows. After GPT-4's pattern (tiktoken, cl100k_base).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bytes_encoding() -> tiktoken.Encoding:
    """One id for each byte value, 0 to 255, and `<|endoftext|>` = 256."""
    ranks = {bytes([value]): value for value in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


def chars_encoding(texts: Iterable[str]) -> tiktoken.Encoding:
    """One id for each different character of the texts, in code point order."""
    characters = sorted(set().union(*texts))
    ranks = {character.encode(): rank for rank, character in enumerate(characters)}
    return tiktoken.Encoding("chars", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})


def bpe_encoding(texts: Sequence[str], size: int) -> tiktoken.Encoding:
    """A byte-level BPE (arXiv 1508.07909, on bytes) of `size` ids, `<|endoftext|>` the last, trained on the texts.

    Raises:
      DataError: the texts have too few pairs to merge for that many ids.
    """
    vocabulary = train_bpe(texts, size - 1).get_vocab()
    if len(vocabulary) < size - 1:
        raise DataError(f"the text has pairs for {len(vocabulary) + 1} tokens only, not for bpe:{size}; ask for fewer")
    byte_of = _byte_of_character()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items()}
    special = {END_OF_TEXT: size - 1}
    return tiktoken.Encoding(f"bpe:{size}", pat_str=BPE_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def train_bpe(texts: Sequence[str], size: int) -> "hf_tokenizers.Tokenizer":
    """The 256 bytes and `size` - 256 merges, ids in the order of merging, as the `tokenizers` library has them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    with console.bar(f"training a tokenizer of {size + 1:,}", None):
        trained.train_from_iterator(texts, trainer)
    return trained


def _byte_of_character() -> dict[str, int]:
    # GPT-2's printable stand-ins for bytes, which `tokenizers` writes its vocabulary in.
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(256 + i): value for i, value in enumerate(hidden)}


def check_name(name: str) -> None:
    """Raises ConfigError unless `build` knows the name."""
    if name in ("bytes", "chars") or name in tiktoken.list_encoding_names():
        return
    match = re.fullmatch(r"bpe:(\d+)", name)
    if not match:
        known = ", ".join(tiktoken.list_encoding_names())
        raise ConfigError(f"unknown tokenizer {name!r}; there are bytes, chars, bpe:N, and tiktoken's {known}")
    if int(match[1]) < 257:
        raise ConfigError(f"{name} is too small: 256 bytes and {END_OF_TEXT} make at least bpe:257")


def build(name: str, texts: Sequence[str]) -> tiktoken.Encoding:
    """The tokenizer of that name, made from the texts where it is that kind.

    Raises:
      ConfigError: no such tokenizer.
      DataError: it cannot be made from the texts, or tiktoken cannot fetch its vocabulary.
    """
    check_name(name)
    if name == "bytes":
        return bytes_encoding()
    if name == "chars":
        return chars_encoding(texts)
    if name.startswith("bpe:"):
        return bpe_encoding(texts, int(name.removeprefix("bpe:")))
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets its HTTP client's errors through
        raise DataError(
            f"tiktoken cannot get its vocabulary {name}: {type(error).__name__}; "
            "where there is no network, TIKTOKEN_CACHE_DIR may name a folder that has it"
        ) from error


def save(encoding: tiktoken.Encoding, directory: Path) -> None:
    """Writes `vocabulary.tiktoken` (tiktoken's own format) and `tokenizer.json` (name, pattern, special tokens)."""
    directory.mkdir(parents=True, exist_ok=True)
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
    write_atomic(directory / "vocabulary.tiktoken", "".join(lines))
    facts = {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    write_atomic(directory / "tokenizer.json", json.dumps(facts, indent=2) + "\n")


def load(directory: Path) -> tiktoken.Encoding:
    """The tokenizer that `save` wrote.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        facts = json.loads((directory / "tokenizer.json").read_text())
        lines = (directory / "vocabulary.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding(
            facts["name"],
            pat_str=facts["pattern"],
            mergeable_ranks=ranks,
            special_tokens=facts["special_tokens"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error


def end_of_text(encoding: tiktoken.Encoding) -> int | None:
    """The id that stands between documents, where there is one."""
    return encoding._special_tokens.get(END_OF_TEXT)


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids of a text; special tokens' names in it are plain text.

    Raises:
      DataError: a character that a `chars` tokenizer does not have.
    """
    if encoding.name == "chars":
        unknown = sorted(set(text) - {token.decode() for token in encoding._mergeable_ranks})
        if unknown:
            raise DataError(f"the character {unknown[0]!r} is not among the {encoding.n_vocab} of this tokenizer")
    return encoding.encode_ordinary(text)


def encode_documents(encoding: tiktoken.Encoding, texts: Sequence[str], label: str) -> np.ndarray:
    """One flat stream of ids, int32 [N]: `<|endoftext|>` before the first document and after each, where it exists."""
    end = end_of_text(encoding)
    border = [] if end is None else [end]
    pieces = [np.array(border, np.int32)]
    with console.bar(label, sum(map(len, texts))) as advance:
        for text in texts:
            pieces.append(np.array(encode(encoding, text) + border, np.int32))
            advance(len(text))
    return np.concatenate(pieces)


def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """How many bytes of text each id stands for, int32 [V]; 0 for special tokens."""
    lengths = np.zeros(encoding.n_vocab, np.int32)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths
