"""What tests of row functions share: options as in the base recipe, a reading of bytes, and rows of text."""

import functools

import numpy as np
from conftest import tiny_config
from ml_collections import ConfigDict

from gptjax.data import token_sets
from gptjax.data.augment import Augment
from gptjax.data.layouts import examples, flat, packed
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.specials import COMMON_NAMES, lookup_special_ids
from gptjax.objectives.reading import reading

BYTES = tokenizers.bytes_encoding()
END = BYTES.end
LAYOUTS = {"flat": flat, "packed": packed, "examples": examples}


@functools.cache
def base_options():
    return tiny_config().objective


def options(**changes):
    """Those of the base recipe, some changed."""
    return ConfigDict({**base_options().to_dict(), **changes})


@functools.cache
def text_set(seed=0, documents=12):
    """Documents of different lengths, in sentences of words, encoded as bytes."""
    rng = np.random.default_rng(seed)
    words = ["the", "a", "model", "reads", "it", "and", "writes", "again"]
    texts = [
        " ".join(f"{' '.join(rng.choice(words, 5))}." for _ in range(1 + n % 4)) + f" {n}" for n in range(documents)
    ]
    return token_sets.from_texts(BYTES, texts, "encoding")


def read_with(sentinels=40, **changes):
    """A reading of bytes, with all special ids."""
    return reading(BYTES, lookup_special_ids(BYTES, list(COMMON_NAMES), sentinels), options(**changes), text_set())


def row_of(layout, k=0, context=48, epoch=0):
    """A row of that text."""
    rows = LAYOUTS[layout](text_set(), context, 0, Augment(), f"objectives {layout} {context}")
    return rows.row(epoch, k % rows.per_epoch)


def draws(seed=0, epoch=0, k=0):
    """What a row draws from."""
    return np.random.default_rng((seed, epoch, k))
