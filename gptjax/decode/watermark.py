"""A watermark in sampled text, and its detector: green lists (Kirchenbauer et al., arXiv 2301.10226, algorithm 2).

Before each draw the tokens before it and a secret key decide which ids are green; their logits are raised by delta.
Who has the key counts green tokens in a text; no model is needed. Nothing here draws a token.

The paper permutes the vocabulary and takes the first gamma of it. Here each id is green by a hash of its own, which
costs a few integer operations an id and no sort: the share of green ids is gamma in expectation, not exactly. The hash
mixes well (https://github.com/skeeto/hash-prospector) but is no cipher: it hides the key from readers, not from
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
    """What the writer and the detector must agree on.

    Attributes:
      key: the secret, 0 to 2^64 - 1.
      gamma: the share of ids that are green.
      delta: what green logits gain (nats); the detector does not need it.
      width: how many tokens before a token decide its green list. More are harder to learn from many texts, and an
        edit spoils more tokens.
    """

    key: int
    gamma: float = 0.25
    delta: float = 2.0
    width: int = 1

    def check(self) -> None:
        """Raises ConfigError for a value that means nothing."""
        if not 0 <= self.key < 2**64:
            raise ConfigError(f"the watermark's key is {self.key}; it must be 0 to 2^64 - 1")
        if not 0 < self.gamma < 1:
            raise ConfigError(f"the watermark's gamma is {self.gamma}; it must be more than 0 and less than 1")
        if not 0 <= self.delta < math.inf:
            raise ConfigError(f"the watermark's delta is {self.delta}; it must be at least 0, and finite")
        if self.width < 1:
            raise ConfigError(f"the watermark's width is {self.width}; it must be at least 1")


class Detection(NamedTuple):
    """What the detector found.

    Attributes:
      z: standard deviations by which green tokens are more than gamma of the tokens (equation 3).
      p_value: how often a text without this watermark has at least this z, by the normal distribution; z > 4 is 3e-5.
      tokens: how many were counted; the same token after the same ones counts once (arXiv 2306.04634).
      green: how many of them are green.
    """

    z: float
    p_value: float
    tokens: int
    green: int


def is_green(tokens: Any, previous_w: Any, watermark: Watermark) -> Any:
    """Whether ids are green after others; for arrays of NumPy and of JAX, with the same result.

    Args:
      tokens: uint32 [...].
      previous_w: the `width` ids before, oldest first, uint32 [..., width]; its leading axes broadcast with `tokens`.
      watermark: `key`, `gamma` and `width` decide.
    """
    low, high = (np.array([half], np.uint32) for half in (watermark.key & 0xFFFFFFFF, watermark.key >> 32))
    seed = _mix(_mix(low) ^ high)  # before ids come in, or one key's lists would be another's after other ids
    for place in range(watermark.width):
        seed = _mix(previous_w[..., place] ^ seed)
    return _mix(tokens ^ seed) < np.uint32(watermark.gamma * 2**32)


def _mix(x: Any) -> Any:
    """A bijection of uint32 in which each bit changes half of the others: lowbias32, with 0 moved from its place."""
    x = x + np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def apply_watermark(logits_BV: jax.Array, previous_Bw: jax.Array, watermark: Watermark) -> jax.Array:
    """The logits with delta added to each row's green ids. On the device; a row depends on nothing but itself.

    Args:
      logits_BV: before temperature and filters.
      previous_Bw: the last `width` ids of each row, oldest first, int32; what stands for missing ones is up to the
        caller, since the detector counts no token with fewer ids before it.
      watermark: static under jit.
    """
    ids_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.uint32)[None]
    green_BV = is_green(ids_1V, previous_Bw.astype(jnp.uint32)[:, None], watermark)
    return logits_BV + jnp.where(green_BV, watermark.delta, 0.0).astype(logits_BV.dtype)


def detect(ids: Sequence[int], watermark: Watermark) -> Detection:
    """Whether ids carry the watermark; their text alone, without a prompt, is enough.

    Raises:
      ConfigError: a watermark that cannot be.
      DataError: fewer ids than the watermark can be told from.
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
    """The same for text, in the tokens that its writer's tokenizer cuts it into.

    Where a model wrote a word in other tokens than the tokenizer would, those few are not found.

    Raises:
      ConfigError, DataError: as `detect`, and characters that the tokenizer does not have.
    """
    return detect(tokenizers.encode(tokenizer, text), watermark)
