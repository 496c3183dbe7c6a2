"""The logit lens, and the loss of each token.

The logit lens (nostalgebraist 2020; arXiv 2303.08112 section 2) applies the final norm and the head to the residual
stream after each block. For decoders and encoders. Pure functions of (model, params, ids).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import sites


class Predictions(NamedTuple):
    """The most likely token at each depth and position of one text."""

    tokens_LT: np.ndarray  # ids; the first row is that of the embedded tokens
    probabilities_LT: np.ndarray


def stream_logits(model: nn.Module, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits_BTV of a residual stream, taken as the output of the last block.

    Raises:
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    layers = num_blocks(model)
    ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)

    @jax.jit
    def head(params: Any, x_BTD: jax.Array) -> jax.Array:  # `jax.jit` removes the earlier layers
        return sites.forward(model, params, ids_BT, changes={f"block_{layers - 1}": x_BTD}).logits_BTV

    return head(params, x_BTD)


def logit_lens(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Float32 logits [L + 1, B, T, V] of the stream before the first block and after each; the last are the model's.

    Raises:
      ConfigError: see `stream_logits`.
    """
    num_blocks(model)

    @jax.jit
    def lens(params: Any) -> jax.Array:
        stream_LBTD = sites.stream(model, params, ids_BT, **more)
        return jax.lax.map(lambda x_BTD: stream_logits(model, params, x_BTD), stream_LBTD)

    return lens(params)


def top_predictions(logits_LTV: Any) -> Predictions:
    """The most likely token by depth and position, for one row of `logit_lens`, `logits_LBTV[:, row]`."""
    probabilities_LTV = jax.nn.softmax(jnp.asarray(logits_LTV), axis=-1)
    return Predictions(np.asarray(probabilities_LTV.argmax(-1)), np.asarray(probabilities_LTV.max(-1)))


def token_loss(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Loss of a decoder for each token after the first, in nats, float32 [B, T - 1]."""
    ids_BT = jnp.asarray(ids_BT)
    logits_BTV = jax.jit(lambda params: models.logits(model, params, ids_BT, **more))(params)
    return nats(logits_BTV, ids_BT)


def nats(logits_BTV: jax.Array, ids_BT: Any) -> jax.Array:
    """-log softmax(logits) of the token after each position, [B, T - 1]."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    return -jnp.take_along_axis(logprobs_BTV, jnp.asarray(ids_BT)[:, 1:, None], axis=-1)[..., 0]


def num_blocks(model: nn.Module) -> int:
    """The number of blocks of a decoder or an encoder.

    Raises:
      ConfigError: the model is neither.
    """
    config = model.config  # type: ignore[attr-defined]
    if models.kind(model) == "seq2seq" or models.is_recurrent(config):
        raise ConfigError(f"this needs a decoder or an encoder made of blocks; the model's arch is {config.arch}")
    return int(config.layers)
