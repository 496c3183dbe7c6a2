"""Tokenizers: builds, saves and loads them, and encodes text.

Names: `bytes`; `chars` (the characters of the text); `bpe:N` (byte-level BPE of N ids, trained on the text); and those
of tiktoken, such as `gpt2`. The last id of each but `chars` is `<|endoftext|>`, which separates documents. All these
are `tiktoken.Encoding`s; the tokenizer of a Hugging Face model may be an `HFTokenizer`.
"""

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tiktoken

from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import console, schema
from gptjax.core.files import read_text, replace_surrogates, write_atomic
from gptjax.data.tokenizers.hf_tokenizer import HFTokenizer, to_bytes

if TYPE_CHECKING:
    import tokenizers as hf_tokenizers

END_OF_TEXT = "<|endoftext|>"

# Pre-tokenization: words with the space before them, numbers of up to three digits, runs of punctuation, line ends with
# the indentation that follows. After GPT-4's pattern (tiktoken, cl100k_base).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# This spelling works in every regex engine; `(?s:.)` is an error in that of `tokenizers`.
ONE_CHARACTER = r"[\s\S]"


class Tokenizer(Protocol):
    """Interface of tokenizers."""

    @property
    def name(self) -> str:
        """Name of the tokenizer."""

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""

    @property
    def begin(self) -> tuple[int, ...]:
        """Ids at the start of a document or prompt, such as Llama's `<|begin_of_text|>`."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """First ids of `begin` that are tuned vectors instead of tokens; see `with_prompt`."""

    @property
    def end(self) -> int | None:
        """Id after a document, if there is one."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Further ids that end generation, such as `<|eot_id|>` of a chat model."""

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes text; names of special tokens are plain text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Decodes ids."""

    def decode_single_token_bytes(self, token: int, /) -> bytes:
        """Returns the bytes that an id adds to a text; raises KeyError if no token has that id."""

    def is_special_token(self, token: int, /) -> bool:
        """Returns True if the id has no text."""


class Encoding(tiktoken.Encoding):
    """`tiktoken.Encoding` with begin and end ids of documents; see `Tokenizer`."""

    prompt: tuple[int, ...]

    def __init__(
        self,
        name: str,
        *,
        begin: Sequence[int] = (),
        end: int | None = None,
        stop_token_ids: Sequence[int] = (),
        **facts: Any,
    ) -> None:
        super().__init__(name, **facts)
        self.begin, self.end, self.prompt, self.stop_token_ids = tuple(begin), end, (), tuple(stop_token_ids)

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """Decodes ids; those of a tuned prompt have no text."""
        return super().decode([token for token in tokens if token not in self.prompt], errors)

    def __getstate__(self) -> object:
        state = {"pat_str": self._pat_str, "mergeable_ranks": self._mergeable_ranks}
        return state | {
            "name": self.name,
            "special_tokens": self._special_tokens,
            "begin": self.begin,
            "end": self.end,
            "stop_token_ids": self.stop_token_ids,
        }


def bytes_encoding() -> Encoding:
    """Returns the tokenizer of one id per byte value, 0 to 255, and `<|endoftext|>` = 256."""
    return _encoding("bytes", ONE_CHARACTER, {bytes([value]): value for value in range(256)}, {END_OF_TEXT: 256})


def chars_encoding(texts: Iterable[str]) -> Encoding:
    """Returns the tokenizer of one id per character that occurs in the texts, in code point order."""
    characters = sorted(set().union(*texts))
    ranks = {character.encode(): rank for rank, character in enumerate(characters)}
    return _encoding("chars", ONE_CHARACTER, ranks, {})


def bpe_encoding(texts: Sequence[str], size: int) -> Encoding:
    """Trains a byte-level BPE (arXiv 1508.07909, on bytes) of `size` ids, the last of which is `<|endoftext|>`.

    Raises:
      DataError: the texts have too few pairs to merge for that size.
    """
    vocabulary = train_bpe(texts, size - 1).get_vocab()
    if len(vocabulary) < size - 1:
        raise DataError(f"the text has pairs for {len(vocabulary) + 1} tokens only, not for bpe:{size}; ask for fewer")
    ranks = {to_bytes(token): rank for token, rank in vocabulary.items()}
    return _encoding(f"bpe:{size}", BPE_PATTERN, ranks, {END_OF_TEXT: size - 1})


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> Encoding:
    end = special.get(END_OF_TEXT)
    return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, end=end)


def train_bpe(texts: Sequence[str], size: int) -> "hf_tokenizers.Tokenizer":
    """Trains a BPE of 256 bytes and `size` - 256 merges, with ids in the order of the merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    with console.bar(f"training a tokenizer of {size + 1:,}", None):
        trained.train_from_iterator(texts, trainer)
    return trained


def check_name(name: str) -> None:
    """Raises ConfigError if `build` does not know the name."""
    if name in ("bytes", "chars") or name in tiktoken.list_encoding_names():
        return
    match = re.fullmatch(r"bpe:(\d+)", name)
    if not match:
        names = ", ".join(tiktoken.list_encoding_names())
        raise ConfigError(f"unknown tokenizer {name!r}; there are bytes, chars, bpe:N, and tiktoken's {names}")
    if int(match[1]) < 257:
        raise ConfigError(f"{name} is too small: 256 bytes and {END_OF_TEXT} make at least bpe:257")


# One more than the highest id of tiktoken's tokenizers, which tiktoken knows only after a download.
TIKTOKEN_SIZES = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "p50k_edit": 50284,
    "cl100k_base": 100277,
    "o200k_base": 200019,
    "o200k_harmony": 201088,
}


def vocab_size_of(name: str) -> int | None:
    """Returns the vocabulary size of the tokenizer of a name, or None if it depends on the text.

    Raises:
      ConfigError: the tokenizer is unknown.
    """
    check_name(name)
    if name.startswith("bpe:"):
        return int(name.removeprefix("bpe:"))
    return 257 if name == "bytes" else TIKTOKEN_SIZES.get(name)


def build(name: str, texts: Sequence[str]) -> Encoding:
    """Builds the tokenizer of a name, training it on the texts if necessary.

    Raises:
      ConfigError: the tokenizer is unknown.
      DataError: it cannot be trained on the texts, or tiktoken cannot download its vocabulary.
    """
    check_name(name)
    if name == "bytes":
        return bytes_encoding()
    if name == "chars":
        return chars_encoding(texts)
    if name.startswith("bpe:"):
        return bpe_encoding(texts, int(name.removeprefix("bpe:")))
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken does not wrap errors of its HTTP client
        raise DataError(
            f"tiktoken cannot get its vocabulary {name}: {type(error).__name__}; "
            "where there is no network, TIKTOKEN_CACHE_DIR may name a folder that has it"
        ) from error
    return _encoding(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `facts.json` and the vocabulary, `vocabulary.tiktoken` or `tokenizer.json`, each in its own format."""
    directory.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"name": tokenizer.name, "begin": tokenizer.begin, "end": tokenizer.end}
    facts |= {"stop_token_ids": tokenizer.stop_token_ids} if tokenizer.stop_token_ids else {}
    match tokenizer:
        case Encoding():
            ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
            lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
            write_atomic(directory / "vocabulary.tiktoken", "".join(lines))
            extra = {"pattern": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens}
            facts = {"kind": "tiktoken"} | facts | extra
        case HFTokenizer():
            write_atomic(directory / "tokenizer.json", tokenizer.text)
            facts = {"kind": "tokenizers"} | facts
        case _:
            raise TypeError(f"no format for {type(tokenizer).__name__}")
    write_atomic(directory / "facts.json", json.dumps(facts, indent=2) + "\n")


COMMON_FACTS = {"name": str, "begin": [int], "end": (int, None), "stop_token_ids?": [int]}
FACTS = ({**COMMON_FACTS, "kind": str, "pattern": str, "special_tokens": {str: int}}, {**COMMON_FACTS, "kind": str})


def load(directory: Path) -> Encoding | HFTokenizer:
    """Loads a tokenizer that `save` wrote.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        facts = schema.read(directory / "facts.json", FACTS)
        stops = facts.get("stop_token_ids", ())
        if facts["kind"] == "tokenizers":
            text = read_text(directory / "tokenizer.json")
            return HFTokenizer(text, facts["name"], facts["begin"], facts["end"], stops)
        lines = read_text(directory / "vocabulary.tiktoken").splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        if len(set(ranks.values())) < len(ranks):
            raise ValueError("two tokens have the same id")
        return Encoding(
            facts["name"],
            pat_str=facts["pattern"],
            mergeable_ranks=ranks,
            special_tokens=facts["special_tokens"],
            begin=facts["begin"],
            end=facts["end"],
            stop_token_ids=stops,
        )
    except (DataError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error


def with_prompt(tokenizer: Tokenizer, prompt: Sequence[int], begin: Sequence[int]) -> Tokenizer:
    """Returns a view of a tokenizer in which every text begins with a tuned prompt; it must not be saved.

    Args:
      tokenizer: tokenizer, which is not modified.
      prompt: ids outside the vocabulary, without text.
      begin: ids after the prompt, the begin ids of texts without it.
    """
    view: Any = copy.copy(tokenizer)
    view.prompt, view.begin = tuple(prompt), (*prompt, *begin)
    result: Tokenizer = view
    return result


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes text; names of special tokens are plain text, and unpaired surrogates become U+FFFD.

    Raises:
      DataError: a character that a `chars` tokenizer does not have.
    """
    text = replace_surrogates(text)
    if tokenizer.name == "chars" and isinstance(tokenizer, Encoding):
        unknown = sorted(set(text) - {token.decode() for token in tokenizer._mergeable_ranks})
        if unknown:
            raise DataError(f"the character {unknown[0]!r} is not among the {tokenizer.n_vocab} of this tokenizer")
    return tokenizer.encode_ordinary(text)


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes text in which names of special tokens are these tokens, such as the output of a chat template.

    Do not use this for untrusted text, which could end one turn and begin another.

    Raises:
      DataError: a character that a `chars` tokenizer does not have.
    """
    text = replace_surrogates(text)
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.encode_special(text)
    special = special_tokens(tokenizer)
    if not special:
        return encode(tokenizer, text)
    longest_first = sorted(special, key=len, reverse=True)  # as in the `tokenizers` library
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids_of_pieces = ([special[piece]] if piece in special else encode(tokenizer, piece) for piece in pieces if piece)
    return [token for ids in ids_of_pieces for token in ids]


def eos_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns all ids that end generation, the end of the tokenizer first."""
    return (*(() if tokenizer.end is None else (tokenizer.end,)), *tokenizer.stop_token_ids)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of special tokens by name."""
    match tokenizer:
        case Encoding():
            return tokenizer._special_tokens
        case HFTokenizer():
            return tokenizer.special_tokens
        case _:
            raise TypeError(f"no special tokens for {type(tokenizer).__name__}")


def encode_array(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encodes text as an array, uint32, without an intermediate list where tiktoken can."""
    text = replace_surrogates(text)
    if isinstance(tokenizer, Encoding) and tokenizer.name == "bytes":
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    if isinstance(tokenizer, Encoding) and tokenizer.name != "chars":
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.array(encode(tokenizer, text), np.uint32)


def sha256(tokenizer: Tokenizer) -> str:
    """Returns a hash of all that determines the ids; tokenizers of the same hash give the same ids for any text."""
    match tokenizer:
        case Encoding():
            parts = [tokenizer._pat_str, sorted(tokenizer._special_tokens.items())]
            ranks = b"".join(
                rank.to_bytes(4, "big") + len(token).to_bytes(4, "big") + token
                for token, rank in sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
            )
        case HFTokenizer():
            parts, ranks = ["tokenizers"], tokenizer.text.encode()
        case _:
            raise TypeError(f"no hash for {type(tokenizer).__name__}")
    facts = json.dumps([*parts, list(tokenizer.begin), tokenizer.end]).encode()
    return hashlib.sha256(facts + b"\0" + ranks).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the number of bytes of each id, int32 [V]; 0 for special tokens and ids without a token."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token in range(tokenizer.n_vocab):
        if not tokenizer.is_special_token(token):
            with suppress(KeyError):
                lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths
