"""What the head would say of the residual stream before the last layer, and how much each token surprises.

The logit lens (nostalgebraist 2020; arXiv 2303.08112 section 2): the stream after any block goes through the
last norm and the head as if no block came after. Pure functions of (model, params, ids); of decoders and encoders.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import sites


class Guesses(NamedTuple):
    """What is likeliest at each depth and position of one text."""

    tokens_LT: np.ndarray  # ids; the first row is of the embedded tokens
    probabilities_LT: np.ndarray


def read_out(model: nn.Module, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits_BTV of the residual stream, as if it were what the last block gives.

    Raises:
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    layers = blocks(model)
    ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)

    @jax.jit
    def ends(params: Any, x_BTD: jax.Array) -> jax.Array:  # what comes before is not computed
        return sites.forward(model, params, ids_BT, changes={f"block_{layers - 1}": x_BTD}).logits_BTV

    return ends(params, x_BTD)


def logit_lens(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Float32 logits [L + 1, B, T, V] of the stream before the first block and after each; the last are the model's.

    Raises:
      ConfigError: as of `read_out`.
    """
    blocks(model)

    @jax.jit
    def lens(params: Any) -> jax.Array:
        stream_LBTD = sites.stream(model, params, ids_BT, **more)
        return jax.lax.map(lambda x_BTD: read_out(model, params, x_BTD), stream_LBTD)

    return lens(params)


def guesses(logits_LTV: Any) -> Guesses:
    """The likeliest token by depth and position, of one row of `logit_lens`, `logits_LBTV[:, row]`."""
    probabilities_LTV = jax.nn.softmax(jnp.asarray(logits_LTV), axis=-1)
    return Guesses(np.asarray(probabilities_LTV.argmax(-1)), np.asarray(probabilities_LTV.max(-1)))


def token_loss(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """Nats that a decoder needs for each token after the first, float32 [B, T - 1]."""
    ids_BT = jnp.asarray(ids_BT)
    logits_BTV = jax.jit(lambda params: models.logits(model, params, ids_BT, **more))(params)
    return nats(logits_BTV, ids_BT)


def nats(logits_BTV: jax.Array, ids_BT: Any) -> jax.Array:
    """-log softmax(logits) of the token after each position, [B, T - 1]."""
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    return -jnp.take_along_axis(logprobs_BTV, jnp.asarray(ids_BT)[:, 1:, None], axis=-1)[..., 0]


def blocks(model: nn.Module) -> int:
    """How many blocks a decoder or an encoder has.

    Raises:
      ConfigError: it is something else.
    """
    config = model.config  # type: ignore[attr-defined]
    if models.kind(model) == "seq2seq" or models.is_recurrent(config):
        raise ConfigError(f"this needs a decoder or an encoder made of blocks; the model's arch is {config.arch}")
    return int(config.layers)
