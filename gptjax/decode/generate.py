"""Text from a model, token by token. Each token reads the whole window anew: no cache, nothing to keep in step."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config import ConfigError, DataError
from gptjax.data import tokenizers
from gptjax.data.tokenizers import Tokenizer
from gptjax.decode.sampling import draw


class Sample(NamedTuple):
    """A continuation: its text, its ids, and each id's log-probability (nats) in the model's own distribution."""

    text: str
    ids: list[int]
    logprobs: list[float]


class Settings(NamedTuple):
    """How to draw a continuation.

    Attributes:
      max_tokens: the most new tokens.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws among the k likeliest; 0 among all.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50

    def check(self) -> None:
        """Raises ConfigError for a setting that means nothing."""
        least = Settings(max_tokens=1, temperature=0, top_k=0)._asdict()
        for name, value in self._asdict().items():
            if not value >= least[name]:
                raise ConfigError(f"{name} is {value}; it must be at least {least[name]}")


class Speaker(NamedTuple):
    """A model ready to go on from a prompt."""

    next_token: Callable[..., tuple[jax.Array, jax.Array]]
    params: Any
    tokenizer: Tokenizer
    context: int  # the most ids that the model reads


def speaker(model: nn.Module, params: Any, tokenizer: Tokenizer, context: int) -> Speaker:
    """A Speaker whose `next_token(params, ids_T, length, key, temperature, top_k)` is compiled.

    It gives the id drawn after the first `length` ids, and its log-probability before temperature and top k.
    """

    @jax.jit
    def next_token(params: Any, ids_T: jax.Array, length: Any, key: Any, temperature: Any, top_k: Any) -> Any:
        logits_V = models.logits(model, params, ids_T[None])[0, length - 1]
        token = draw(logits_V, key, temperature, top_k)
        return token, jax.nn.log_softmax(logits_V)[token]

    return Speaker(next_token, params, tokenizer, context)


def padded(length: int, context: int) -> int:
    """How many ids are read for a window of `length`: the next power of two, so that few programs are compiled."""
    return min(context, max(128, 1 << (length - 1).bit_length()))


def stream(of: Speaker, prompt: Sequence[int], settings: Settings, key: jax.Array) -> Iterator[tuple[int, float]]:
    """Yields (id, log-probability) for each new token; past its context the model sees the newest ids."""
    ids = list(prompt)
    for n in range(settings.max_tokens):
        window = ids[-of.context :]
        ids_T = np.zeros(padded(len(window), of.context), np.int32)
        ids_T[: len(window)] = window
        drawn = jax.random.fold_in(key, n)
        token, logprob = of.next_token(of.params, ids_T, len(window), drawn, settings.temperature, settings.top_k)
        ids.append(int(token))
        yield ids[-1], float(logprob)


def prompt_ids(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """The ids that a prompt stands for, with what a document begins with; an empty one is the border between documents.

    Raises:
      DataError: a character that the tokenizer does not have, no ids at all, or more than `context`.
    """
    border = [] if tokenizer.end is None else [tokenizer.end]
    ids = [*tokenizer.begin, *tokenizers.encode(tokenizer, prompt)] or border
    if not ids:
        raise DataError("the prompt is empty, and this tokenizer has no token to begin with; give --prompt")
    if len(ids) > context:
        raise DataError(f"the prompt has {len(ids)} tokens, more than the model's context of {context}")
    return ids


def generate(
    of: Speaker,
    prompt: str,
    settings: Settings,
    key: jax.Array,
    on_text: Callable[[str], None] = lambda text: None,
) -> Sample:
    """A continuation of the prompt, up to the end of a document or `settings.max_tokens`.

    Args:
      of: who goes on.
      prompt: text to go on from.
      settings: how to draw.
      key: decides every draw.
      on_text: gets each piece of text as it comes, whole characters only.

    Raises:
      ConfigError, DataError: settings or a prompt that cannot be.
    """
    settings.check()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids, logprobs, text = [], [], []

    def add(raw: bytes, final: bool = False) -> None:
        text.append(decoder.decode(raw, final))
        on_text(text[-1])

    for token, logprob in stream(of, prompt_ids(of.tokenizer, prompt, of.context), settings, key):
        ids.append(token)
        logprobs.append(logprob)
        if token == of.tokenizer.end:
            break
        try:
            raw = of.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # a row of the embedding that the tokenizer has no token for
            break
        add(raw)
    add(b"", final=True)
    return Sample("".join(text), ids, logprobs)
