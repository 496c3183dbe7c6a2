"""What a model is given to go on from. A decoder: the prompt itself. An encoder-decoder: the prompt is its source.

An encoder-decoder's own text begins with a start id, which is its prompt as everything else in gptjax.decode knows it:
so penalties, lengths and histories are of the target alone. Ids only; nothing here touches a model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer


class Prompt(NamedTuple):
    """What a text goes on from.

    Attributes:
      ids: of the text itself, so far.
      source: of an encoder-decoder, what its encoder reads; else nothing.
    """

    ids: tuple[int, ...]
    source: tuple[int, ...] = ()


def prompt_ids(tokenizer: Tokenizer, prompt: str, context: int) -> tuple[int, ...]:
    """The ids that a prompt stands for, with what a document begins with; an empty one is the border between documents.

    Args:
      tokenizer: whose ids.
      prompt: text.
      context: the most ids that a prompt may have together with one new token; 0 for any number.

    Raises:
      DataError: a character that the tokenizer does not have, no ids at all, or too many.
    """
    border = [] if tokenizer.end is None else [tokenizer.end]
    return check_prompt_ids([*tokenizer.begin, *tokenizers.encode(tokenizer, prompt)] or border, context)


def check_prompt_ids(ids: Sequence[int], context: int) -> tuple[int, ...]:
    """The ids of a prompt, which something can follow; errors as of `prompt_ids`."""
    if not ids:
        raise DataError("the prompt is empty, and this tokenizer has no token to begin with; give --prompt")
    if context and len(ids) >= context:
        raise DataError(
            f"the prompt has {len(ids)} tokens, and the model's context is {context}, the new ones included; "
            "shorten it, or give --sliding_context"
        )
    return tuple(ids)


def check_source_ids(ids: Sequence[int], context: int) -> tuple[int, ...]:
    """The ids of a source.

    Raises:
      DataError: there are none, or more than `context`.
    """
    if not ids:
        raise DataError("the source has no tokens; give some")
    if len(ids) > context:
        raise DataError(f"the source has {len(ids)} tokens, and the model's context is {context}; shorten it")
    return tuple(ids)


def start_ids(config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the text of an encoder-decoder begins with.

    Args:
      config: `config.model`; reads start and forced_first.
      tokenizer: whose end stands in for the former.

    Raises:
      ConfigError: neither is there.
    """
    start = tokenizer.end if config.start is None else config.start
    if start is None:
        raise ConfigError(f"the tokenizer {tokenizer.name} has no end of text for a target to begin with")
    return (start,) if config.forced_first is None else (start, config.forced_first)
