"""Predicts masked tokens with an encoder: the text is read once, and each mask is filled independently."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.specials import COMMON_NAMES, decode_with_specials, lookup_special_ids
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode.prefill import MIN_CHUNK, bucket

MASKS = re.compile("|".join(map(re.escape, COMMON_NAMES["mask"])))


class MaskCandidate(NamedTuple):
    """A predicted token of a mask: id, text and probability."""

    token: int
    text: str
    probability: float


class FilledText(NamedTuple):
    """A text with each mask replaced by its most likely token, and the candidates of each mask, most likely first."""

    text: str
    masks: list[list[MaskCandidate]]

    def lines(self) -> str:
        """Formats the text and its candidates for printing."""
        several = len(self.masks) > 1
        lines = [self.text]
        for number, mask in enumerate(self.masks, 1):
            lines += [f"mask {number}"] if several else []
            lines += [f"  {one.probability:.4f}  {one.text!r}" for one in mask]
        return "\n".join(lines)


def fill(model: nn.Module, params: Any, tokenizer: Tokenizer, text: str, k: int = 5) -> FilledText:
    """Returns the k most likely tokens for each mask in a text.

    Args:
      model: an encoder.
      params: of the model.
      tokenizer: of the model.
      text: with at least one mask, written as in COMMON_NAMES, such as [MASK].
      k: number of candidates for each mask.

    Raises:
      ConfigError: the model is no encoder or was trained without masks, or `k` is invalid.
      DataError: no mask, too many tokens, or a character that the tokenizer does not have.
    """
    V, context = model.config.vocabulary, model.config.context  # type: ignore[attr-defined]
    if models.kind(model) != "encoder":
        raise ConfigError("this model is no encoder and cannot fill in masks; it continues a prompt")
    if not 1 <= k <= V:
        raise ConfigError(f"top_k is {k}; it must be 1 to {V}")
    mask = lookup_special_ids(tokenizer, ["mask"]).ids["mask"]
    if mask >= V:
        raise ConfigError("this model was trained without masks; train it with --config.train.objective=masked")
    ids = encode_masked(tokenizer, text, mask)
    if len(ids) > context:
        raise DataError(f"the text has {len(ids)} tokens, and the model's context is {context}; shorten it")
    positions = [place for place, token in enumerate(ids) if token == mask]
    ids_1T = np.zeros((1, max(len(ids), min(bucket(len(ids), MIN_CHUNK), context))), np.int32)
    ids_1T[0, : len(ids)] = ids
    segments_1T = (np.arange(ids_1T.shape[1]) < len(ids)).astype(np.int32)[None]
    probability_TV = np.asarray(token_probabilities(model, params, ids_1T, segments_1T))[0]
    masks = []
    for place in positions:
        best = np.argsort(-probability_TV[place], kind="stable")[:k].tolist()
        masks.append(
            [MaskCandidate(i, decode_with_specials(tokenizer, [i]), float(probability_TV[place, i])) for i in best]
        )
        ids[place] = best[0]
    begin, end = len(tokenizer.begin), len(closing_ids(tokenizer))
    return FilledText(decode_with_specials(tokenizer, ids[begin : len(ids) - end]), masks)


def encode_masked(tokenizer: Tokenizer, text: str, mask: int) -> list[int]:
    """Returns the ids of a text with masks, with special tokens around it.

    Raises:
      DataError: there is no mask, or a character that the tokenizer does not have.
    """
    pieces = MASKS.split(text)
    if len(pieces) == 1:
        raise DataError("the prompt has no mask to fill in; write [MASK] where a token is missing")
    # Most vocabularies have the space before a word in its token, and so in the masked token.
    has_plain_spaces = tokenizer.name in ("bytes", "chars")
    before = pieces[:-1] if has_plain_spaces else [piece.removesuffix(" ") for piece in pieces[:-1]]
    ids = [token for piece in before for token in (*tokenizers.encode(tokenizer, piece), mask)]
    return [*tokenizer.begin, *ids, *tokenizers.encode(tokenizer, pieces[-1]), *closing_ids(tokenizer)]


def closing_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids after a text: the separator, else the end of text, where the vocabulary has one."""
    special = tokenizers.special_tokens(tokenizer)
    separators = [special[name] for name in COMMON_NAMES["separator"] if name in special]
    return tuple(separators[:1]) or (() if tokenizer.end is None else (tokenizer.end,))


@partial(jax.jit, static_argnums=0)
def token_probabilities(model: nn.Module, params: Any, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns the probability of each id at each position, [B, T, V]."""
    return jax.nn.softmax(models.logits(model, params, ids_BT, segments_BT=segments_BT))
