"""Incremental detokenization: whole characters only, up to a stop string, an end token or an id without a token.

Pure functions on the host: the `State` of a row is an argument and a result.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers.tokenizers import Tokenizer


class State(NamedTuple):
    """Input that has not been output yet.

    Attributes:
      pending: bytes of an incomplete character.
      held: text that may be the beginning of a stop string.
      ended: reason why the text ended, "stop" or "end"; None while it continues.
    """

    pending: bytes = b""
    held: str = ""
    ended: str | None = None


class Detokenized(NamedTuple):
    """Result of detokenizing some tokens.

    Attributes:
      state: for the next tokens.
      text: new text, without any part of a stop string.
      used: number of tokens that belong to the row; the one that ended it is the last of them.
      stop: the stop string that ended it, which is not part of the text.
    """

    state: State
    text: str
    used: int
    stop: str | None = None


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """Returns stop strings as a tuple.

    Raises:
      ConfigError: one is empty, which would end every text before its first character.
    """
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if "" in stop_strings:
        raise ConfigError("a stop string is empty; leave it out")
    return stop_strings


def detokenize(
    state: State, tokens: Sequence[int], tokenizer: Tokenizer, stop_strings: tuple[str, ...] = ()
) -> Detokenized:
    """Returns the state and the text after more tokens of a row.

    A text ends with the first character that completes a stop string; where one character completes several, the
    longest of them is removed. It also ends with one of the tokenizer's end ids ("end"), and with an id that the
    tokenizer has no token for, such as padding of the embedding ("end" too).

    Args:
      state: after the previous tokens; `State()` at the beginning. A state that has ended takes no token.
      tokens: ids.
      tokenizer: decodes the ids.
      stop_strings: from `check_stop_strings`.
    """
    texts = []
    for used, token in enumerate(tokens if state.ended is None else ()):
        raw = _token_bytes(token, tokenizer)
        state, text, stop = _append_bytes(state, raw or b"", stop_strings, final=raw is None)
        texts.append(text)
        if state.ended is not None:
            return Detokenized(state, "".join(texts), used + 1, stop)
    return Detokenized(state, "".join(texts), len(tokens) if state.ended is None else 0)


def flush(state: State, stop_strings: tuple[str, ...] = ()) -> Detokenized:
    """Returns the rest of a text at its end; bytes of an incomplete character become U+FFFD."""
    if state.ended is not None:
        return Detokenized(state, "", 0)
    state, text, stop = _append_bytes(state, b"", stop_strings, final=True)
    return Detokenized(state, text, 0, stop)


def _token_bytes(token: int, tokenizer: Tokenizer) -> bytes | None:
    """Returns the bytes of a token; None for one that ends the text."""
    if token == tokenizer.end or token in tokenizer.stop_token_ids:
        return None
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return None


def _append_bytes(
    state: State, raw: bytes, stop_strings: tuple[str, ...], final: bool
) -> tuple[State, str, str | None]:
    pending = state.pending + raw
    new, decoded = codecs.utf_8_decode(pending, "replace", final)
    text = state.held + new
    # No stop string was complete before, so a complete one begins in the held text or later.
    ends = [(text.find(string) + len(string), -len(string), string) for string in stop_strings if string in text]
    if ends:
        end, _, stop = min(ends)
        return State(ended="stop"), text[: end - len(stop)], stop
    if final:
        return State(ended="end"), text, None
    n_held = _stop_prefix_length(text, stop_strings)
    return State(pending[decoded:], text[len(text) - n_held :]), text[: len(text) - n_held], None


def _stop_prefix_length(text: str, stop_strings: tuple[str, ...]) -> int:
    """Returns how many of the last characters may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop_strings), default=1) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if any(string.startswith(text[-size:]) for string in stop_strings)), 0)
