"""What an encoder finds likeliest where a text has masks: the text is read once, and each mask filled in for itself.

Nothing is drawn, and nothing is written after the text: an encoder writes none.
"""

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
from gptjax.decode.prefill import SHORTEST, bucket

MASKS = re.compile("|".join(map(re.escape, COMMON_NAMES["mask"])))


class Filling(NamedTuple):
    """An id that a mask may stand for, its text, and how likely it is."""

    token: int
    text: str
    probability: float


class Filled(NamedTuple):
    """A text with each mask filled in with its likeliest id, and the likeliest ids of each, in order."""

    text: str
    masks: list[list[Filling]]

    def lines(self) -> str:
        """The same for the eye."""
        several = len(self.masks) > 1
        found = [self.text]
        for number, mask in enumerate(self.masks, 1):
            found += [f"mask {number}"] if several else []
            found += [f"  {one.probability:.4f}  {one.text!r}" for one in mask]
        return "\n".join(found)


def fill(model: nn.Module, params: Any, tokenizer: Tokenizer, text: str, k: int = 5) -> Filled:
    """The k likeliest fillings of each mask in a text, which is written there as in USUAL, such as [MASK].

    Args:
      model: an encoder.
      params: of the model.
      tokenizer: of the model.
      text: with at least one mask.
      k: how many.

    Raises:
      ConfigError: another kind of model, one that knows no mask, or a k that cannot be.
      DataError: no mask, too many tokens, or a character that the tokenizer does not have.
    """
    V, context = model.config.vocabulary, model.config.context  # type: ignore[attr-defined]
    if models.kind(model) != "encoder":
        raise ConfigError("this model is no encoder, and fills in no masks; it goes on from a prompt")
    if not 1 <= k <= V:
        raise ConfigError(f"top_k is {k}; it must be 1 to {V}")
    mask = lookup_special_ids(tokenizer, ["mask"]).ids["mask"]
    if mask >= V:
        raise ConfigError("this model was trained without masks; train it with --config.train.objective=masked")
    ids = masked_ids(tokenizer, text, mask)
    if len(ids) > context:
        raise DataError(f"the text has {len(ids)} tokens, and the model's context is {context}; shorten it")
    places = [place for place, token in enumerate(ids) if token == mask]
    ids_1T = np.zeros((1, max(len(ids), min(bucket(len(ids), SHORTEST), context))), np.int32)
    ids_1T[0, : len(ids)] = ids
    segments_1T = (np.arange(ids_1T.shape[1]) < len(ids)).astype(np.int32)[None]
    probability_TV = np.asarray(probabilities(model, params, ids_1T, segments_1T))[0]
    masks = []
    for place in places:
        likeliest = np.argsort(-probability_TV[place], kind="stable")[:k].tolist()
        masks.append(
            [Filling(i, decode_with_specials(tokenizer, [i]), float(probability_TV[place, i])) for i in likeliest]
        )
        ids[place] = likeliest[0]
    begin, end = len(tokenizer.begin), len(closing(tokenizer))
    return Filled(decode_with_specials(tokenizer, ids[begin : len(ids) - end]), masks)


def masked_ids(tokenizer: Tokenizer, text: str, mask: int) -> list[int]:
    """The ids that an encoder reads for a text with masks.

    Raises:
      DataError: there is none, or a character that the tokenizer does not have.
    """
    pieces = MASKS.split(text)
    if len(pieces) == 1:
        raise DataError("the prompt has no mask to fill in; write [MASK] where a token is missing")
    # Most vocabularies have the space before a word in its token, and so in what the mask stands for.
    apart = tokenizer.name in ("bytes", "chars")
    before = pieces[:-1] if apart else [piece.removesuffix(" ") for piece in pieces[:-1]]
    ids = [token for piece in before for token in (*tokenizers.encode(tokenizer, piece), mask)]
    return [*tokenizer.begin, *ids, *tokenizers.encode(tokenizer, pieces[-1]), *closing(tokenizer)]


def closing(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What stands behind a text: a separator in vocabularies that have one, else the end, if there is one."""
    known = tokenizers.special_tokens(tokenizer)
    separators = [known[name] for name in COMMON_NAMES["separator"] if name in known]
    return tuple(separators[:1]) or (() if tokenizer.end is None else (tokenizer.end,))


@partial(jax.jit, static_argnums=0)
def probabilities(model: nn.Module, params: Any, ids_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Of each id at each place, [B, T, V]."""
    return jax.nn.softmax(models.logits(model, params, ids_BT, segments_BT=segments_BT))
