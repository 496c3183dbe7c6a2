"""Tokenizers: text to token ids and back; here they are made, saved and loaded.

By name: `bytes`; `chars` (each character of the text); `bpe:N` (byte-level BPE of N ids, trained on the text); and
tiktoken's own, such as `gpt2`. Every one but `chars` ends with `<|endoftext|>`, which stands between documents. These
are all `tiktoken.Encoding`s; one that comes with a Hugging Face model may have to be a `LibraryTokenizer`.
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
from gptjax.data.tokenizers.hf_tokenizer import LibraryTokenizer, to_bytes

if TYPE_CHECKING:
    import tokenizers as hf_tokenizers

END_OF_TEXT = "<|endoftext|>"

# How text is cut before pairs are merged: words with the space before them, numbers of up to three digits, runs of
# punctuation, line ends together with the indentation that follows. After GPT-4's pattern (tiktoken, cl100k_base).
BPE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# In the spelling that means the same to every engine: `(?s:.)` is an error to the one in `tokenizers`.
ONE_CHARACTER = r"[\s\S]"


class Tokenizer(Protocol):
    """What the rest of gptjax asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""

    @property
    def begin(self) -> tuple[int, ...]:
        """The ids that a document or prompt starts with, such as Llama's `<|begin_of_text|>`."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """The first of these that are no token's, but vectors that a run tuned; see `beginning_with`."""

    @property
    def end(self) -> int | None:
        """The id after a document, where there is one."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Further ids that end a generated text, such as a chat model's `<|eot_id|>`."""

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; special tokens' names in it are plain text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of the ids."""

    def decode_single_token_bytes(self, token: int, /) -> bytes:
        """The bytes that an id adds to a text; KeyError where no token has that id."""

    def is_special_token(self, token: int, /) -> bool:
        """Whether the id stands for no text."""


class Encoding(tiktoken.Encoding):
    """A `tiktoken.Encoding` that knows where documents begin and end; see `Tokenizer`."""

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
        """The text of the ids; a prompt's have none."""
        return super().decode([token for token in tokens if token not in self.prompt], errors)

    def __getstate__(self) -> object:
        kept = {"pat_str": self._pat_str, "mergeable_ranks": self._mergeable_ranks}
        return kept | {
            "name": self.name,
            "special_tokens": self._special_tokens,
            "begin": self.begin,
            "end": self.end,
            "stop_token_ids": self.stop_token_ids,
        }


def bytes_encoding() -> Encoding:
    """One id for each byte value, 0 to 255, and `<|endoftext|>` = 256."""
    return _encoding("bytes", ONE_CHARACTER, {bytes([value]): value for value in range(256)}, {END_OF_TEXT: 256})


def chars_encoding(texts: Iterable[str]) -> Encoding:
    """One id for each different character of the texts, in code point order."""
    characters = sorted(set().union(*texts))
    ranks = {character.encode(): rank for rank, character in enumerate(characters)}
    return _encoding("chars", ONE_CHARACTER, ranks, {})


def bpe_encoding(texts: Sequence[str], size: int) -> Encoding:
    """A byte-level BPE (arXiv 1508.07909, on bytes) of `size` ids, `<|endoftext|>` the last, trained on the texts.

    Raises:
      DataError: the texts have too few pairs to merge for that many ids.
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
    """The 256 bytes and `size` - 256 merges, ids in the order of merging, as the `tokenizers` library has them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated")
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([cut, spelt])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    with console.bar(f"training a tokenizer of {size + 1:,}", None):
        trained.train_from_iterator(texts, trainer)
    return trained


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


# One more than the highest id of tiktoken's own, which it knows only after a download.
TIKTOKEN_SIZES = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "p50k_edit": 50284,
    "cl100k_base": 100277,
    "o200k_base": 200019,
    "o200k_harmony": 201088,
}


def size_by_name(name: str) -> int | None:
    """How many ids the tokenizer that `build` makes will have, where its name says that; None where the text does.

    Raises:
      ConfigError: no such tokenizer.
    """
    check_name(name)
    if name.startswith("bpe:"):
        return int(name.removeprefix("bpe:"))
    return 257 if name == "bytes" else TIKTOKEN_SIZES.get(name)


def build(name: str, texts: Sequence[str]) -> Encoding:
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
        known = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets its HTTP client's errors through
        raise DataError(
            f"tiktoken cannot get its vocabulary {name}: {type(error).__name__}; "
            "where there is no network, TIKTOKEN_CACHE_DIR may name a folder that has it"
        ) from error
    return _encoding(name, known._pat_str, known._mergeable_ranks, known._special_tokens)


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `facts.json` and the vocabulary: `vocabulary.tiktoken` or `tokenizer.json`, each library's own format."""
    directory.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"name": tokenizer.name, "begin": tokenizer.begin, "end": tokenizer.end}
    facts |= {"stop_token_ids": tokenizer.stop_token_ids} if tokenizer.stop_token_ids else {}
    match tokenizer:
        case Encoding():
            ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
            lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
            write_atomic(directory / "vocabulary.tiktoken", "".join(lines))
            own = {"pattern": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens}
            facts = {"kind": "tiktoken"} | facts | own
        case LibraryTokenizer():
            write_atomic(directory / "tokenizer.json", tokenizer.text)
            facts = {"kind": "tokenizers"} | facts
        case _:
            raise TypeError(f"no format for {type(tokenizer).__name__}")
    write_atomic(directory / "facts.json", json.dumps(facts, indent=2) + "\n")


COMMON = {"name": str, "begin": [int], "end": (int, None), "stop_token_ids?": [int]}
FACTS = ({**COMMON, "kind": str, "pattern": str, "special_tokens": {str: int}}, {**COMMON, "kind": str})


def load(directory: Path) -> Encoding | LibraryTokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        facts = schema.read(directory / "facts.json", FACTS)
        stops = facts.get("stop_token_ids", ())
        if facts["kind"] == "tokenizers":
            text = read_text(directory / "tokenizer.json")
            return LibraryTokenizer(text, facts["name"], facts["begin"], facts["end"], stops)
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


def beginning_with(tokenizer: Tokenizer, prompt: Sequence[int], begin: Sequence[int]) -> Tokenizer:
    """The tokenizer as it is seen where every text begins with a tuned prompt; not to be saved, or it would stay so.

    Args:
      tokenizer: of the text, which does not change.
      prompt: ids that no token has; they stand for no text.
      begin: ids that follow these, and begin texts otherwise.
    """
    view: Any = copy.copy(tokenizer)
    view.prompt, view.begin = tuple(prompt), (*prompt, *begin)
    seen: Tokenizer = view
    return seen


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text; special tokens' names in it are plain text, and half of a surrogate pair is U+FFFD.

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
    """The ids of a text in which special tokens' names are these tokens, such as what a chat template gives.

    Never for a text that others wrote: it could say where a turn ends and another begins.

    Raises:
      DataError: a character that a `chars` tokenizer does not have.
    """
    text = replace_surrogates(text)
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.encode_special(text)
    special = special_tokens(tokenizer)
    if not special:
        return encode(tokenizer, text)
    longest_first = sorted(special, key=len, reverse=True)  # as the `tokenizers` library has it
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    found = ([special[piece]] if piece in special else encode(tokenizer, piece) for piece in pieces if piece)
    return [token for ids in found for token in ids]


def eos_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a generated text, the tokenizer's end first."""
    return (*(() if tokenizer.end is None else (tokenizer.end,)), *tokenizer.stop_token_ids)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of special tokens by name."""
    match tokenizer:
        case Encoding():
            return tokenizer._special_tokens
        case LibraryTokenizer():
            return tokenizer.special_tokens
        case _:
            raise TypeError(f"no special tokens for {type(tokenizer).__name__}")


def encode_array(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The same as an array, uint32, which tiktoken makes without a list in between."""
    text = replace_surrogates(text)
    if isinstance(tokenizer, Encoding) and tokenizer.name == "bytes":
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
    if isinstance(tokenizer, Encoding) and tokenizer.name != "chars":
        return tokenizer.encode_to_numpy(text, disallowed_special=())
    return np.array(encode(tokenizer, text), np.uint32)


def sha256(tokenizer: Tokenizer) -> str:
    """Of all that decides its ids; two tokenizers with the same one make the same ids of the same text."""
    match tokenizer:
        case Encoding():
            own = [tokenizer._pat_str, sorted(tokenizer._special_tokens.items())]
            ranks = b"".join(
                rank.to_bytes(4, "big") + len(token).to_bytes(4, "big") + token
                for token, rank in sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
            )
        case LibraryTokenizer():
            own, ranks = ["tokenizers"], tokenizer.text.encode()
        case _:
            raise TypeError(f"no hash for {type(tokenizer).__name__}")
    facts = json.dumps([*own, list(tokenizer.begin), tokenizer.end]).encode()
    return hashlib.sha256(facts + b"\0" + ranks).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for, int32 [V]; 0 for special tokens and for ids that no token has."""
    lengths = np.zeros(tokenizer.n_vocab, np.int32)
    for token in range(tokenizer.n_vocab):
        if not tokenizer.is_special_token(token):
            with suppress(KeyError):
                lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths
