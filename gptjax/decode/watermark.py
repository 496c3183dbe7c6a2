"""Watermark for sampled text, and its detector: green lists (Kirchenbauer et al., arXiv 2301.10226, algorithm 2).

Before each token is sampled, the previous tokens and a secret key determine which ids are green; delta is added to
their logits. The detector counts green tokens in a text and needs the key, but no model.

The paper permutes the vocabulary and takes the first gamma of it. Here each id is green by a hash of its own, which
costs a few integer operations per id and no sort: the fraction of green ids is gamma in expectation, not exactly. The
hash mixes well (https://github.com/skeeto/hash-prospector) but is not cryptographic: it does not protect the key from
cryptanalysis.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer


class Watermark(NamedTuple):
    """Parameters that generation and detection must share.

    Attributes:
      key: the secret, 0 to 2^64 - 1.
      gamma: fraction of ids that are green.
      delta: nats added to green logits; not used by the detector.
      width: number of previous tokens that determine the green list of a token. With more, the lists are harder to
        learn from many texts, and an edit affects more tokens.
    """

    key: int
    gamma: float = 0.25
    delta: float = 2.0
    width: int = 1

    def check(self) -> None:
        """Raises ConfigError for an invalid value."""
        if not 0 <= self.key < 2**64:
            raise ConfigError(f"the watermark's key is {self.key}; it must be 0 to 2^64 - 1")
        if not 0 < self.gamma < 1:
            raise ConfigError(f"the watermark's gamma is {self.gamma}; it must be more than 0 and less than 1")
        if not 0 <= self.delta < math.inf:
            raise ConfigError(f"the watermark's delta is {self.delta}; it must be at least 0, and finite")
        if self.width < 1:
            raise ConfigError(f"the watermark's width is {self.width}; it must be at least 1")


class Detection(NamedTuple):
    """Result of the detector.

    Attributes:
      z: z-score of the number of green tokens (equation 3).
      p_value: probability of at least this z without the watermark, by the normal distribution; z > 4 is 3e-5.
      tokens: number of tokens counted; a token after the same previous tokens counts once (arXiv 2306.04634).
      green: number of those that are green.
    """

    z: float
    p_value: float
    tokens: int
    green: int


def is_green(tokens: Any, previous_w: Any, watermark: Watermark) -> Any:
    """Returns True for ids that are green after the previous ones; NumPy and JAX arrays give the same result.

    Args:
      tokens: uint32 [...].
      previous_w: the `width` ids before, oldest first, uint32 [..., width]; its leading axes broadcast with `tokens`.
      watermark: its `key`, `gamma` and `width` are used.
    """
    low, high = (np.array([half], np.uint32) for half in (watermark.key & 0xFFFFFFFF, watermark.key >> 32))
    seed = _mix(_mix(low) ^ high)  # before ids come in, or one key's lists would be another's after other ids
    for i in range(watermark.width):
        seed = _mix(previous_w[..., i] ^ seed)
    return _mix(tokens ^ seed) < np.uint32(watermark.gamma * 2**32)


def _mix(x: Any) -> Any:
    """Hashes uint32 bijectively, each bit affecting half of the others: lowbias32 with an offset, since it fixes 0."""
    x = x + np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def apply_watermark(logits_BV: jax.Array, previous_Bw: jax.Array, watermark: Watermark) -> jax.Array:
    """Adds delta to the logits of each row's green ids. Rows are independent.

    Args:
      logits_BV: logits before temperature and filters.
      previous_Bw: the last `width` ids of each row, oldest first, int32; any ids in place of missing ones, since the
        detector does not count tokens with fewer ids before them.
      watermark: static under jit.
    """
    ids_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.uint32)[None]
    green_BV = is_green(ids_1V, previous_Bw.astype(jnp.uint32)[:, None], watermark)
    return logits_BV + jnp.where(green_BV, watermark.delta, 0.0).astype(logits_BV.dtype)


def detect(ids: Sequence[int], watermark: Watermark) -> Detection:
    """Tests ids for the watermark; needs neither the prompt nor the model.

    Raises:
      ConfigError: invalid parameters of the watermark.
      DataError: too few ids for the watermark's width.
    """
    watermark.check()
    width, gamma = watermark.width, watermark.gamma
    if len(ids) <= width:
        raise DataError(f"the text has {len(ids)} tokens; a watermark of width {width} needs at least {width + 1}")
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, np.uint32), width + 1)
    pairs = np.unique(windows, axis=0)
    T, green = len(pairs), int(is_green(pairs[:, -1], pairs[:, :-1], watermark).sum())
    z = (green - gamma * T) / math.sqrt(T * gamma * (1 - gamma))
    return Detection(z, math.erfc(z / math.sqrt(2)) / 2, T, green)


def detect_text(text: str, tokenizer: Tokenizer, watermark: Watermark) -> Detection:
    """Tests a text for the watermark, encoded with the tokenizer of its model.

    Words that the model wrote in other tokens than the tokenizer's are not detected.

    Raises:
      ConfigError, DataError: as for `detect`, and for characters that the tokenizer does not have.
    """
    return detect(tokenizers.encode(tokenizer, text), watermark)
