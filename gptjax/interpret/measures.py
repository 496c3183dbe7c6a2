"""What ablations, patches and attributions are measured by: functions of logits_BTV, one number a text, [B]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.interpret.lens import nats

Measure = Callable[[jax.Array], jax.Array]


def logit(token: Any, position: int = -1) -> Measure:
    """The logit of a token, or of one a text [B], at a position."""
    return lambda logits_BTV: _of(logits_BTV[:, position], token)


def logit_difference(right: Any, wrong: Any, position: int = -1) -> Measure:
    """By how much the logit of one token is above another's (arXiv 2211.00593 section 2)."""
    return lambda logits_BTV: _of(logits_BTV[:, position], right) - _of(logits_BTV[:, position], wrong)


def logprob(token: Any, position: int = -1) -> Measure:
    """The logarithm of a token's probability at a position."""
    return lambda logits_BTV: _of(jax.nn.log_softmax(logits_BTV[:, position], axis=-1), token)


def loss(ids_BT: Any) -> Measure:
    """The mean of a decoder's nats per token."""
    return lambda logits_BTV: nats(logits_BTV, ids_BT).mean(1)


def _of(x_BV: jax.Array, token: Any) -> jax.Array:
    tokens_B = jnp.broadcast_to(jnp.asarray(token), x_BV.shape[:1])
    return jnp.take_along_axis(x_BV, tokens_B[:, None], axis=-1)[:, 0]
