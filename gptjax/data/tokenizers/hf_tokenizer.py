"""Tokenizers of the `tokenizers` library, with the interface of gptjax.data.tokenizers.tokenizers."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from gptjax.core.files import replace_surrogates

# GPT-2's printable characters for the bytes 0 to 255, in which byte-level vocabularies are written.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
ALPHABET = [chr(256 + _UNPRINTABLE.index(byte)) if byte in _UNPRINTABLE else chr(byte) for byte in range(256)]
_BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def to_bytes(piece: str) -> bytes:
    """Returns the bytes of a token of a byte-level vocabulary; raises KeyError if it is not written in ALPHABET."""
    return bytes(_BYTE_OF[character] for character in piece)


class HFTokenizer:
    """`tokenizers.Tokenizer` of a `tokenizer.json`.

    Text is encoded as the library does it: names of special tokens are plain text, added tokens that are not special
    are matched first, and text is normalized. So decoding need not restore the text (GPT-1's is lower case), and parts
    outside the vocabulary become the unknown token, or nothing if there is none.

    Args:
      text: content of a `tokenizer.json`.
      name: name of the tokenizer.
      begin: ids at the start of every document and prompt.
      end: id after a document.
      stop_token_ids: further ids that end generation.

    Raises:
      ValueError: the library cannot read the text.
    """

    def __init__(
        self,
        text: str,
        name: str,
        begin: Sequence[int] = (),
        end: int | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.library = _library(text, plain=True)
        self.text, self.name, self.begin, self.end = text, name, tuple(begin), end
        self.stop_token_ids = tuple(stop_token_ids)
        self.prompt: tuple[int, ...] = ()
        self.n_vocab = max(self.library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._added = self.library.get_added_tokens_decoder()
        decoder = json.loads(text).get("decoder") or {}
        self._kinds, self._replacements = _decoder_parts(decoder)
        # Prefix of tokens that continue a word in a WordPiece vocabulary.
        self._continuing: str | None = decoder["prefix"] if decoder.get("type") == "WordPiece" else None

    def encode_ordinary(self, text: str) -> list[int]:
        """Encodes text without `begin` and `end`."""
        return _ids(self.library, text)

    def encode_special(self, text: str) -> list[int]:
        """Encodes text in which names of special tokens are these tokens."""
        return _ids(self._recognising, text)

    @cached_property
    def _recognising(self) -> Any:
        return _library(self.text, plain=False)

    def decode(self, ids: Sequence[int], /) -> str:
        """Decodes ids as the library does, special tokens as their names; ids of a tuned prompt have no text."""
        return self.library.decode([token for token in ids if token not in self.prompt], skip_special_tokens=False)

    def decode_single_token_bytes(self, token: int, /) -> bytes:
        """Returns the bytes that an id adds to a preceding text: `▁the` is ` the` everywhere.

        Raises:
          KeyError: no token has that id.
        """
        piece = self.library.id_to_token(token)
        if piece is None:
            raise KeyError(token)
        if token in self._added:
            return piece.encode()
        if "ByteFallback" in self._kinds and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes.fromhex(match[1])
        if "ByteLevel" in self._kinds and all(character in _BYTE_OF for character in piece):
            return to_bytes(piece)
        if self._continuing is not None:
            within = piece.startswith(self._continuing)
            return (piece.removeprefix(self._continuing) if within else f" {piece}").encode()
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    def is_special_token(self, token: int, /) -> bool:
        """Returns True if the id has no text."""
        return token in self._added and self._added[token].special

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return {token.content: token_id for token_id, token in self._added.items() if token.special}


def _library(text: str, plain: bool) -> Any:
    # Tokenizer of the library; `plain`: names of special tokens are plain text.
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(str(error)) from error
    library.encode_special_tokens = plain
    library.no_truncation()
    library.no_padding()
    return library


def _ids(library: Any, text: str) -> list[int]:
    return library.encode(replace_surrogates(text), add_special_tokens=False).ids  # as tiktoken does


def _decoder_parts(decoder: dict[str, Any]) -> tuple[set[str], list[tuple[str, str]]]:
    # Types of the parts of a decoder, and the replacements that they make in a token.
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    replacements = []
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": old}:
                replacements.append((old, " "))
            case {"type": "BPEDecoder", "suffix": old}:
                replacements.append((old, " "))
    return {part.get("type", "") for part in parts}, replacements


def describe(
    vocabulary: dict[str, int], merges: Any, added: dict[str, bool], model: Any = None, **parts: Any
) -> dict[str, Any]:
    """Returns a `tokenizer.json` of a BPE, byte-level by default.

    Args:
      vocabulary: ids of all tokens.
      merges: pairs of tokens.
      added: added tokens; True: special.
      model: settings of the BPE that differ from the defaults.
      **parts: `pre_tokenizer` and other parts of the file.
    """
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": vocabulary[name], "content": name} | flags | {"special": kind} for name, kind in added.items()]
    defaults: dict[str, Any] = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    defaults |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": byte_level(use_regex=True),
        **parts,
        "model": {"type": "BPE", **defaults, **(model or {}), "vocab": vocabulary, "merges": merges},
    }


def byte_level(use_regex: bool, add_prefix_space: bool = False) -> dict[str, Any]:
    """Returns the ByteLevel part of a `tokenizer.json`; `use_regex` splits by GPT-2's pattern."""
    kind = {"type": "ByteLevel", "add_prefix_space": add_prefix_space}
    return kind | {"trim_offsets": True, "use_regex": use_regex}
