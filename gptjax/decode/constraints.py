"""Constrained decoding: only tokens with which the text can still match a regular expression, a schema or a choice.

llguidance, an optional extra, keeps the grammar on the host, one `Matcher` a row, and says after each token which may
come next. The device gets that as one bit per id. Nothing here draws a token or knows a model.
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
    """What a text must be as a whole; plain data.

    Attributes:
      kind: what it was made from, for messages.
      text: as llguidance reads it.
    """

    kind: str
    text: str


def regex(pattern: str) -> Grammar:
    r"""Text that the whole pattern matches.

    The syntax is that of Rust's `regex`: Python's without look-around, back references and `\b`. Its `\d` and `\w` mean
    every script's and know letters that an older Python's Unicode does not: `[0-9]` says less and is surer.

    Raises:
      ConfigError: it does not parse.
    """
    return _validated(Grammar("the regular expression", _library().LLMatcher.grammar_from_regex(pattern)))


def json_schema(schema: str | dict[str, Any]) -> Grammar:
    """JSON that the schema accepts, without white space between its parts.

    A member `"x-guidance": {"whitespace_flexible": true}` of the schema allows white space, any amount of it. Keywords
    that cannot be kept are refused, not passed over.

    Args:
      schema: as JSON, or the object that it stands for.

    Raises:
      ConfigError: no JSON, no schema, one that nothing can meet, or a keyword that llguidance does not support.
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
    """One of the texts, to the letter.

    Raises:
      ConfigError: there are none.
    """
    if isinstance(texts, str) or not texts:
        raise ConfigError("choices must be a list of one text or more")
    rules = " | ".join(json.dumps(text) for text in texts)
    return _validated(Grammar("the list of choices", _library().LLMatcher.grammar_from_lark(f"start: {rules}")))


class Matcher:
    """A row's place in a grammar. It changes with each token; `copy` keeps a place.

    Attributes:
      is_complete: the text so far matches. A row that ends for want of tokens while this is False has broken text.
      is_done: nothing may follow but the end token: it was taken, or all is said, or there is a problem.
      problem: why nothing can follow though the text does not match yet: the tokenizer lacks a character, or llguidance
        gave up on a grammar that is too complex.
      allowed_W: which ids may come next, a bit each, uint32 [W]; means nothing when the row is done.
    """

    def __init__(self, matcher: Any, vocabulary: int, source: "_TokenizerAdapter") -> None:
        self._matcher, self._vocabulary, self._source = matcher, vocabulary, source
        self.problem: str | None = None
        self._look()

    def _look(self) -> None:
        end, endless = self._source.eos_token_id, self._source.tokenizer.end is None
        mask_W = np.zeros(bitmask_words(max(self._vocabulary, len(self._source.tokens))), np.uint32)
        known_W = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(mask_W)]
        mask_W[: len(known_W)] = known_W
        may_end = _has(mask_W, end)
        mask_W[end // _BITS] &= ~np.uint32(1 << end % _BITS)
        ending = not mask_W.any()
        if may_end and not endless:
            mask_W[end // _BITS] |= np.uint32(1 << end % _BITS)
        self.allowed_W = mask_W[: bitmask_words(self._vocabulary)]
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            self.problem = "it has no token to go on with" if "NoExtension" in reason else reason
        self.is_complete = self.problem is None and self._matcher.is_accepting()
        self.is_done = ending or self.problem is not None or self._matcher.is_stopped()

    def advance(self, token: int) -> None:
        """Takes a token that `allowed_W` allows.

        Raises:
          ValueError: it is not allowed, or the row is done.
        """
        if self.is_done or not _has(self.allowed_W, token):
            raise ValueError(f"token {token} is not allowed here")
        self._matcher.consume_token(token)
        self._look()

    def copy(self) -> "Matcher":
        """Another one at the same place, which goes its own way."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other


def _has(mask_W: np.ndarray, token: int) -> bool:
    return bool(mask_W[token // _BITS] >> np.uint32(token % _BITS) & 1)


class Constraint(NamedTuple):
    """A grammar ready for a tokenizer and a model."""

    beginning: Matcher

    def start(self) -> Matcher:
        """A Matcher for a row, before its first new token."""
        return self.beginning.copy()


def compile_grammar(grammar: Grammar, tokenizer: Tokenizer, vocabulary: int) -> Constraint:
    """The grammar in the tokenizer's tokens.

    A tokenizer without an end token ends a text when nothing more may come: `[0-9]{1,3}` gives three digits.

    Args:
      grammar: what the text must be.
      tokenizer: any; what llguidance makes of it is kept for the next time.
      vocabulary: V, how many logits the model has; ids that no token has are never allowed.

    Raises:
      ConfigError: no token of the tokenizer can begin such a text, or the grammar is too complex.
    """
    source, prepared = _library_tokenizer(cast(Hashable, tokenizer))
    matcher = _library().LLMatcher(prepared, grammar.text, log_level=0)
    if matcher.is_error():
        raise ConfigError(f"{grammar.kind} cannot be used: {_one_line(matcher.get_error())}")
    beginning = Matcher(matcher, vocabulary, source)
    if beginning.problem:
        raise ConfigError(f"{grammar.kind} cannot be met with the tokenizer {tokenizer.name}: {beginning.problem}")
    if beginning.is_done:
        raise ConfigError(f"{grammar.kind} allows no text but the empty one")
    return Constraint(beginning)


def bitmask_words(vocabulary: int) -> int:
    """W, how many words of 32 bits hold a bit for each of V ids."""
    return -(-vocabulary // _BITS)


def batched_bitmask(matchers: Sequence[Matcher | None], vocabulary: int) -> np.ndarray:
    """`allowed_W` of each row, uint32 [B, W]; everything for a row that is done or has no constraint (None)."""
    allowed_BW = np.full((len(matchers), bitmask_words(vocabulary)), 0xFFFFFFFF, np.uint32)
    for row, matcher in enumerate(matchers):
        if matcher is not None and not matcher.is_done:
            allowed_BW[row] = matcher.allowed_W
    return allowed_BW


def apply_bitmask(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """The logits with those of ids whose bit is 0 at -inf. On the device; a row depends on nothing but itself."""
    B, V = logits_BV.shape
    bits_BW32 = allowed_BW[..., None] >> jnp.arange(_BITS, dtype=jnp.uint32) & 1
    return jnp.where(bits_BW32.reshape(B, -1)[:, :V] == 1, logits_BV, -jnp.inf)


class _TokenizerAdapter:
    """A tokenizer as llguidance asks for it: bytes of every id, and the ids of a text whose bytes must come next."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens = [b""] * tokenizer.n_vocab  # what stays empty is never allowed
        self.special_token_ids = []
        for token in range(tokenizer.n_vocab):
            with suppress(KeyError):
                self.tokens[token] = tokenizer.decode_single_token_bytes(token)
                if tokenizer.is_special_token(token):
                    self.special_token_ids.append(token)
        if tokenizer.end is None:  # llguidance cannot do without; Matcher takes it out of every mask
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<end>")
        self.eos_token_id = len(self.tokens) - 1 if tokenizer.end is None else tokenizer.end
        special = set(self.special_token_ids)
        self.ids = {raw: token for token, raw in enumerate(self.tokens) if raw and token not in special}
        self.longest = max(map(len, self.ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokenizer's own ids where they spell the text: what a model has learnt to read."""
        raw = text.encode()
        with suppress(DataError):
            ids = tokenizers.encode(self.tokenizer, text)
            if b"".join(self.tokens[token] for token in ids) == raw:
                return ids
        return self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        """The longest token, and again, as far as there are any."""
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
    """The grammar; ConfigError where llguidance refuses it."""
    problem = _library().LLMatcher.validate_grammar(grammar.text)
    if problem and not problem.startswith("WARNING"):
        raise ConfigError(f"{grammar.kind} cannot be used: {_one_line(problem)}")
    return grammar


def _one_line(message: str) -> str:
    """The reason in a message that may also draw the place, name it, and go on with the parser's state."""
    told = message.partition("<state>")[0].splitlines()
    lines = [line for line in told if not re.match(r" *(\d+ \||\^)", line)]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), " ".join(lines))
    return re.sub(r"^at \d+\(\d+\): invalid regex .* \(in regex\): ", "", reason).strip()[:200]
