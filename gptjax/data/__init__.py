"""Data: text in, batches out. `load` is the whole way; each step of it is a function in a file of its own."""

from typing import Any, NamedTuple

import numpy as np

from gptjax.data import batches, sources, tokenizers
from gptjax.data.tokenizers import Tokenizer


class Data(NamedTuple):
    """What a run trains on."""

    tokenizer: Tokenizer
    train_N: np.ndarray  # int32, one stream of token ids
    held_out_N: np.ndarray
    held_out_text: bytes  # what held_out_N says, for comparison with general compressors
    fingerprint: str  # of the corpus


def load(config: Any, tokenizer: Tokenizer | None = None) -> Data:
    """Reads the text that `config` (a run's `config.data`) names and turns it into token streams.

    Args:
      config: `config.data`.
      tokenizer: the run's, or None to make the one that `config.tokenizer` names.

    Raises:
      ConfigError: no such tokenizer.
      DataError: text missing, not text, or shorter than a window.
    """
    if tokenizer is None:
        tokenizers.check_name(config.tokenizer)
    corpus = sources.read(config)
    train, held_out = ([d.text for d in side] for side in corpus)
    # An alphabet has to cover what is held out too; merges are learnt from the training text alone.
    seen = train + held_out if config.tokenizer == "chars" else train
    tokenizer = tokenizer or tokenizers.build(config.tokenizer, seen)
    train_N = tokenizers.encode_documents(tokenizer, train, "encoding the training text")
    held_out_N = tokenizers.encode_documents(tokenizer, held_out, "encoding the held-out text")
    longest = max(stage.context for stage in batches.stages(config))
    batches.check_length(train_N, longest, "the training text")
    batches.check_length(held_out_N, 1, "the held-out text")
    return Data(tokenizer, train_N, held_out_N, "".join(held_out).encode(), sources.fingerprint(corpus))
