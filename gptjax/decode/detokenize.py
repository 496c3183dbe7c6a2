"""Text from tokens, as they come: whole characters only, up to a stop string, an end token or an id without a token.

On the host, and pure: what is known of a row's text so far is a `State`, an argument and a result. Nothing here draws
a token or writes to a terminal.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers.tokenizers import Tokenizer


class State(NamedTuple):
    """What has been read but not given out.

    Attributes:
      pending: bytes of a character that is not whole yet.
      held: text that may turn out to be the beginning of a stop string.
      ended: why the text is over, "stop" or "end"; None while it goes on.
    """

    pending: bytes = b""
    held: str = ""
    ended: str | None = None


class Detokenized(NamedTuple):
    """What came of some tokens.

    Attributes:
      state: for the next ones.
      text: to be shown now; never a part of a stop string.
      used: how many of the tokens belong to the row: the one that ended it is the last of them.
      stop: the stop string that ended it, which is no part of the text.
    """

    state: State
    text: str
    used: int
    stop: str | None = None


def check_stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    """Stop strings as the functions below take them.

    Raises:
      ConfigError: an empty one, which would stop every text before its first character.
    """
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if "" in strings:
        raise ConfigError("a stop string is empty; leave it out")
    return strings


def detokenize(state: State, tokens: Sequence[int], tokenizer: Tokenizer, strings: tuple[str, ...] = ()) -> Detokenized:
    """The state and the text after more tokens of a row.

    A text ends at the first of its characters with which a stop string is whole; where several are whole with the
    same character, the longest of them is taken off. It also ends with one of the tokenizer's end ids ("end"), and
    with an id that the tokenizer has no token for, such as a row that pads the embedding ("end" too).

    Args:
      state: after the tokens before; `State()` at the beginning. A state that has ended takes no token.
      tokens: ids.
      tokenizer: whose ids they are.
      strings: from `stops`.
    """
    shown = []
    for used, token in enumerate(tokens if state.ended is None else ()):
        raw = _token_bytes(token, tokenizer)
        state, text, stop = _append_bytes(state, raw or b"", strings, final=raw is None)
        shown.append(text)
        if state.ended is not None:
            return Detokenized(state, "".join(shown), used + 1, stop)
    return Detokenized(state, "".join(shown), len(tokens) if state.ended is None else 0)


def flush(state: State, strings: tuple[str, ...] = ()) -> Detokenized:
    """The rest of a text that no more tokens will come for; bytes that are no whole character become U+FFFD."""
    if state.ended is not None:
        return Detokenized(state, "", 0)
    state, text, stop = _append_bytes(state, b"", strings, final=True)
    return Detokenized(state, text, 0, stop)


def _token_bytes(token: int, tokenizer: Tokenizer) -> bytes | None:
    """What a token adds to a text; None where it ends it."""
    if token == tokenizer.end or token in tokenizer.stop_token_ids:
        return None
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return None


def _append_bytes(state: State, raw: bytes, strings: tuple[str, ...], final: bool) -> tuple[State, str, str | None]:
    known = state.pending + raw
    new, whole = codecs.utf_8_decode(known, "replace", final)
    text = state.held + new
    # No stop string was whole before, so one that is now began in what was held or later.
    ends = [(text.find(string) + len(string), -len(string), string) for string in strings if string in text]
    if ends:
        end, _, stop = min(ends)
        return State(ended="stop"), text[: end - len(stop)], stop
    if final:
        return State(ended="end"), text, None
    kept = _stop_prefix_length(text, strings)
    return State(known[whole:], text[len(text) - kept :]), text[: len(text) - kept], None


def _stop_prefix_length(text: str, strings: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, strings), default=1) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if any(string.startswith(text[-size:]) for string in strings)), 0)
