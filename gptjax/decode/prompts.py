"""Token ids of prompts. A decoder continues the prompt; for an encoder-decoder the prompt is the source.

The target of an encoder-decoder begins with a start id, which the rest of gptjax.decode treats as its prompt: so
penalties, lengths and histories are of the target alone. Nothing here touches a model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer


class Prompt(NamedTuple):
    """Token ids that a text continues.

    Attributes:
      ids: of the text itself; the start of the target for an encoder-decoder.
      source: read by the encoder of an encoder-decoder; else empty.
    """

    ids: tuple[int, ...]
    source: tuple[int, ...] = ()


def prompt_ids(tokenizer: Tokenizer, prompt: str, context: int) -> tuple[int, ...]:
    """Returns the ids of a prompt, with those that begin a document; the end-of-text id for an empty prompt.

    Args:
      tokenizer: encodes the prompt.
      prompt: text.
      context: maximum number of ids, one new token included; 0 for no maximum.

    Raises:
      DataError: a character that the tokenizer does not have, no ids at all, or too many.
    """
    end = [] if tokenizer.end is None else [tokenizer.end]
    return check_prompt_ids([*tokenizer.begin, *tokenizers.encode(tokenizer, prompt)] or end, context)


def check_prompt_ids(ids: Sequence[int], context: int) -> tuple[int, ...]:
    """Returns the ids of a prompt, after checking that a token can follow; raises like `prompt_ids`."""
    if not ids:
        raise DataError("the prompt is empty, and this tokenizer has no token to begin with; give --prompt")
    if context and len(ids) >= context:
        raise DataError(
            f"the prompt has {len(ids)} tokens, and the model's context is {context}, the new ones included; "
            "shorten it, or give --sliding_context"
        )
    return tuple(ids)


def check_source_ids(ids: Sequence[int], context: int) -> tuple[int, ...]:
    """Returns the ids of a source, after checking their number.

    Raises:
      DataError: there are none, or more than `context`.
    """
    if not ids:
        raise DataError("the source has no tokens; give some")
    if len(ids) > context:
        raise DataError(f"the source has {len(ids)} tokens, and the model's context is {context}; shorten it")
    return tuple(ids)


def start_ids(config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the target of an encoder-decoder begins with.

    Args:
      config: `config.model`; reads `start` and `forced_first`.
      tokenizer: its end-of-text id is used where `start` is None.

    Raises:
      ConfigError: there is neither a start nor an end-of-text id.
    """
    start = tokenizer.end if config.start is None else config.start
    if start is None:
        raise ConfigError(f"the tokenizer {tokenizer.name} has no end of text for a target to begin with")
    return (start,) if config.forced_first is None else (start, config.forced_first)
