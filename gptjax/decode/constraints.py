"""Constrained decoding: only tokens with which the text can still match a regular expression, a schema or a choice.

llguidance, an optional extra, matches the grammar on the host with one `Matcher` per row, and computes after each token
which ids are allowed next. The device gets a bitmask with one bit per id.
"""

import copy
import json
import re
from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

_BITS = 32  # of a word of a mask


class Grammar(NamedTuple):
    """A grammar that a whole text must match; plain data.

    Attributes:
      kind: description of its origin, for messages.
      text: in llguidance's format.
    """

    kind: str
    text: str


def regex(pattern: str) -> Grammar:
    r"""Returns the grammar of texts that the whole pattern matches.

    The syntax is that of Rust's `regex`: Python's without look-around, back references and `\b`. Its `\d` and `\w`
    match digits and letters of every script, also those that an older Python's Unicode lacks; `[0-9]` is safer.

    Raises:
      ConfigError: the pattern does not parse.
    """
    return _validated(Grammar("the regular expression", _library().LLMatcher.grammar_from_regex(pattern)))


def json_schema(schema: str | dict[str, Any]) -> Grammar:
    """Returns the grammar of JSON that the schema accepts, without white space between its parts.

    A member `"x-guidance": {"whitespace_flexible": true}` of the schema allows any amount of white space. Keywords that
    llguidance does not support are refused, not ignored.

    Args:
      schema: a JSON schema, as text or parsed.

    Raises:
      ConfigError: no JSON, no schema, one that no text matches, or an unsupported keyword.
    """
    kind = "the JSON schema"
    try:
        parsed = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{kind} is no JSON: {_one_line(str(error))}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f'{kind} must be an object, such as {{"type": "object"}}')
    compact = {"whitespace_flexible": False}
    return _validated(Grammar(kind, _library().LLMatcher.grammar_from_json_schema(parsed, compact)))


def choices(texts: Sequence[str]) -> Grammar:
    """Returns the grammar of exactly one of the texts.

    Raises:
      ConfigError: there are no texts.
    """
    if isinstance(texts, str) or not texts:
        raise ConfigError("choices must be a list of one text or more")
    rules = " | ".join(json.dumps(text) for text in texts)
    return _validated(Grammar("the list of choices", _library().LLMatcher.grammar_from_lark(f"start: {rules}")))


class Matcher:
    """State of a row in a grammar, updated by each token.

    Attributes:
      is_complete: the text so far matches. A row that is cut off while this is False has an incomplete text.
      is_done: nothing but the end token can follow: the text ended, is complete, or there is a problem.
      problem: reason why nothing can follow an incomplete text: the tokenizer lacks a character, or llguidance gave up
        on a grammar that is too complex.
      allowed_W: bitmask of the ids that may come next, uint32 [W]; undefined when the row is done.
    """

    def __init__(self, matcher: Any, vocabulary: int, source: "_TokenizerAdapter") -> None:
        self._matcher, self._vocabulary, self._source = matcher, vocabulary, source
        self.problem: str | None = None
        self._update()

    def _update(self) -> None:
        end, endless = self._source.eos_token_id, self._source.tokenizer.end is None
        mask_W = np.zeros(bitmask_words(max(self._vocabulary, len(self._source.tokens))), np.uint32)
        bitmask_W = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(mask_W)]
        mask_W[: len(bitmask_W)] = bitmask_W
        may_end = _has(mask_W, end)
        mask_W[end // _BITS] &= ~np.uint32(1 << end % _BITS)
        ending = not mask_W.any()
        if may_end and not endless:
            mask_W[end // _BITS] |= np.uint32(1 << end % _BITS)
        self.allowed_W = mask_W[: bitmask_words(self._vocabulary)]
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            self.problem = "it has no token that can follow" if "NoExtension" in reason else reason
        self.is_complete = self.problem is None and self._matcher.is_accepting()
        self.is_done = ending or self.problem is not None or self._matcher.is_stopped()

    def advance(self, token: int) -> None:
        """Appends a token.

        Raises:
          ValueError: the token is not allowed, or the row is done.
        """
        if self.is_done or not _has(self.allowed_W, token):
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)
        self._update()

    def copy(self) -> "Matcher":
        """Returns an independent copy."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other


def _has(mask_W: np.ndarray, token: int) -> bool:
    return bool(mask_W[token // _BITS] >> np.uint32(token % _BITS) & 1)


class Constraint(NamedTuple):
    """A grammar compiled for a tokenizer and a model."""

    initial: Matcher

    def start(self) -> Matcher:
        """Returns a Matcher for a row, before its first new token."""
        return self.initial.copy()


def compile_grammar(grammar: Grammar, tokenizer: Tokenizer, vocabulary: int) -> Constraint:
    """Compiles a grammar for a tokenizer.

    With a tokenizer without an end token, a text ends when nothing more may follow: `[0-9]{1,3}` gives three digits.

    Args:
      grammar: that the text must match.
      tokenizer: any; llguidance's form of it is cached.
      vocabulary: V, number of the model's logits; ids without a token are never allowed.

    Raises:
      ConfigError: no token of the tokenizer can begin such a text, or the grammar is too complex.
    """
    source, prepared = _library_tokenizer(cast(Hashable, tokenizer))
    matcher = _library().LLMatcher(prepared, grammar.text, log_level=0)
    if matcher.is_error():
        raise ConfigError(f"{grammar.kind} cannot be used: {_one_line(matcher.get_error())}")
    initial = Matcher(matcher, vocabulary, source)
    if initial.problem:
        raise ConfigError(f"{grammar.kind} cannot be met with the tokenizer {tokenizer.name}: {initial.problem}")
    if initial.is_done:
        raise ConfigError(f"{grammar.kind} allows no text but the empty one")
    return Constraint(initial)


def bitmask_words(vocabulary: int) -> int:
    """Returns W, the number of 32-bit words in a bitmask of V ids."""
    return -(-vocabulary // _BITS)


def batched_bitmask(matchers: Sequence[Matcher | None], vocabulary: int) -> np.ndarray:
    """Returns `allowed_W` of each row, uint32 [B, W]; all ids for a row that is done or has no constraint (None)."""
    allowed_BW = np.full((len(matchers), bitmask_words(vocabulary)), 0xFFFFFFFF, np.uint32)
    for row, matcher in enumerate(matchers):
        if matcher is not None and not matcher.is_done:
            allowed_BW[row] = matcher.allowed_W
    return allowed_BW


def apply_bitmask(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Sets logits of ids whose bit is 0 to -inf. Rows are independent."""
    B, V = logits_BV.shape
    bits_BW32 = allowed_BW[..., None] >> jnp.arange(_BITS, dtype=jnp.uint32) & 1
    return jnp.where(bits_BW32.reshape(B, -1)[:, :V] == 1, logits_BV, -jnp.inf)


class _TokenizerAdapter:
    """Adapts a tokenizer to llguidance: bytes of every id, and the ids of a text whose bytes must come next."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens = [b""] * tokenizer.n_vocab  # an empty one is never allowed
        self.special_token_ids = []
        for token in range(tokenizer.n_vocab):
            with suppress(KeyError):
                self.tokens[token] = tokenizer.decode_single_token_bytes(token)
                if tokenizer.is_special_token(token):
                    self.special_token_ids.append(token)
        if tokenizer.end is None:  # llguidance needs one; Matcher removes it from every mask
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<end>")
        self.eos_token_id = len(self.tokens) - 1 if tokenizer.end is None else tokenizer.end
        special = set(self.special_token_ids)
        self.ids = {raw: token for token, raw in enumerate(self.tokens) if raw and token not in special}
        self.longest = max(map(len, self.ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Returns the tokenizer's own ids where they spell the text, as the model has seen in training."""
        raw = text.encode()
        with suppress(DataError):
            ids = tokenizers.encode(self.tokenizer, text)
            if b"".join(self.tokens[token] for token in ids) == raw:
                return ids
        return self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        """Matches the longest token repeatedly, as far as there is one."""
        ids, at = [], 0
        while at < len(raw):
            sizes = range(min(self.longest, len(raw) - at), 0, -1)
            size = next((size for size in sizes if raw[at : at + size] in self.ids), None)
            if size is None:
                break
            ids.append(self.ids[raw[at : at + size]])
            at += size
        return ids


@lru_cache(maxsize=8)
def _library_tokenizer(tokenizer: Any) -> tuple[_TokenizerAdapter, Any]:
    source = _TokenizerAdapter(tokenizer)
    return source, _library().LLTokenizer(source)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError("constraints need llguidance: pip install 'gptjax[constraints]'") from error
    return llguidance


def _validated(grammar: Grammar) -> Grammar:
    """Returns the grammar; raises ConfigError where llguidance refuses it."""
    problem = _library().LLMatcher.validate_grammar(grammar.text)
    if problem and not problem.startswith("WARNING"):
        raise ConfigError(f"{grammar.kind} cannot be used: {_one_line(problem)}")
    return grammar


def _one_line(message: str) -> str:
    """Extracts the reason from a message that may also show the position and the parser's state."""
    lines_before_state = message.partition("<state>")[0].splitlines()
    lines = [line for line in lines_before_state if not re.match(r" *(\d+ \||\^)", line)]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), " ".join(lines))
    return re.sub(r"^at \d+\(\d+\): invalid regex .* \(in regex\): ", "", reason).strip()[:200]
