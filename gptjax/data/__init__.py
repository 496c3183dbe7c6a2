"""Data: text in, batches out. `load` is the whole way; each step of it is a function in a file of its own."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from gptjax import console
from gptjax.data import batches, sources, tokenizers


class Data(NamedTuple):
    """What a run trains on."""

    tokenizer: tiktoken.Encoding
    train_N: np.ndarray  # int32, one stream of token ids
    held_out_N: np.ndarray
    held_out_text: bytes  # what held_out_N says, for comparison with general compressors
    fingerprint: str  # of the corpus


def load(config: Any, tokenizer: tiktoken.Encoding | None = None) -> Data:
    """Reads the text that `config` (a run's `config.data`) names and turns it into token streams.

    Args:
      config: `config.data`.
      tokenizer: the run's, or None to make the one that `config.tokenizer` names.

    Raises:
      ConfigError: no such tokenizer.
      DataError: text missing, not text, or shorter than a window.
    """
    tokenizers.check_name(config.tokenizer)
    corpus = sources.read(config)
    train, held_out = ([d.text for d in side] for side in corpus)
    tokenizer = tokenizer or tokenizers.build(config.tokenizer, train + held_out if config.tokenizer == "chars" else train)
    streams = [
        tokenizers.encode_documents(tokenizer, side, f"tokens of the {name} text")
        for name, side in (("training", train), ("held-out", held_out))
    ]
    batches.check_length(streams[0], config.context, "the training text")
    batches.check_length(streams[1], 1, "the held-out text")
    raw = "".join(held_out).encode()
    return Data(tokenizer, streams[0], streams[1], raw, sources.fingerprint(corpus))
