"""Text from a model, token by token. Each token reads the whole window anew: no cache, nothing to keep in step."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import linen as nn

from gptjax import random
from gptjax.config import ConfigError, DataError
from gptjax.data import tokenizers
from gptjax.decode.sampling import draw


class Sample(NamedTuple):
    """A continuation: its text, its ids, and each id's log-probability (nats) in the model's own distribution."""

    text: str
    ids: list[int]
    logprobs: list[float]


NextToken = Callable[..., tuple[jax.Array, jax.Array]]


def next_token(model: nn.Module) -> NextToken:
    """Compiled `(params, ids_T, length, key, temperature, top_k) -> (id, log-probability before temperature)`."""

    @jax.jit
    def step(params: Any, ids_T: jax.Array, length: Any, key: Any, temperature: Any, top_k: Any) -> Any:
        logits_V = model.apply({"params": params}, ids_T[None])[0, length - 1]
        token = draw(logits_V, key, temperature, top_k)
        return token, jax.nn.log_softmax(logits_V)[token]

    return step


def stream(
    step: NextToken,
    params: Any,
    prompt: Sequence[int],
    context: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    key: jax.Array,
) -> Iterator[tuple[int, float]]:
    """Yields (id, log-probability) for each new token; beyond `context` the model sees the last `context` ids."""
    ids = list(prompt)
    for n in range(max_tokens):
        window = ids[-context:]
        ids_T = np.zeros(context, np.int32)
        ids_T[: len(window)] = window
        token, logprob = step(params, ids_T, len(window), jax.random.fold_in(key, n), temperature, top_k)
        ids.append(int(token))
        yield ids[-1], float(logprob)


def prompt_ids(tokenizer: tiktoken.Encoding, prompt: str, context: int) -> list[int]:
    """The ids that a prompt stands for; an empty one is the border between documents.

    Raises:
      DataError: a character that the tokenizer does not have, no ids at all, or more than `context`.
    """
    ids = tokenizers.encode(tokenizer, prompt)
    end = tokenizers.end_of_text(tokenizer)
    if not ids and end is None:
        raise DataError("the prompt is empty, and this tokenizer has no token to begin with; give --prompt")
    if len(ids) > context:
        raise DataError(f"the prompt has {len(ids)} tokens, more than the model's context of {context}")
    return ids or [end or 0]


def check_settings(max_tokens: int, temperature: float, top_k: int) -> None:
    """Raises ConfigError for settings that mean nothing."""
    for name, value, least in (("max_tokens", max_tokens, 1), ("temperature", temperature, 0), ("top_k", top_k, 0)):
        if not value >= least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")


def generate(
    step: NextToken,
    params: Any,
    tokenizer: tiktoken.Encoding,
    context: int,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    index: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> Sample:
    """A continuation of the prompt, up to `<|endoftext|>` or `max_tokens`.

    Args:
      step: what `next_token` made.
      params: of the model.
      tokenizer: of the model.
      context: the most tokens that the model reads.
      prompt: text to go on from.
      max_tokens: the most new tokens.
      temperature: divides the logits; 0 takes the likeliest.
      top_k: draws among the k likeliest; 0 among all.
      seed: with `index` decides every draw.
      index: which of several samples this is.
      on_text: gets each piece of text as it comes, whole characters only.

    Raises:
      ConfigError, DataError: settings or a prompt that cannot be.
    """
    check_settings(max_tokens, temperature, top_k)
    ids, end = prompt_ids(tokenizer, prompt, context), tokenizers.end_of_text(tokenizer)
    known = tokenizer.n_vocab
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    key = random.key(seed, "sample", index)
    sample = Sample("", [], [])
    text: list[str] = []
    for token, logprob in stream(step, params, ids, context, max_tokens, temperature, top_k, key):
        sample.ids.append(token)
        sample.logprobs.append(logprob)
        if token == end or token >= known:
            break
        text.append(decoder.decode(tokenizer.decode_single_token_bytes(token)))
        on_text(text[-1])
    text.append(decoder.decode(b"", final=True))
    on_text(text[-1])
    return sample._replace(text="".join(text))
