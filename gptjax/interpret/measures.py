"""Measures for ablation, patching and attribution: functions of logits_BTV that return one value per text, [B]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.interpret.lens import nats

Measure = Callable[[jax.Array], jax.Array]


def logit(token: Any, position: int = -1) -> Measure:
    """The logit at a position of a token, or of one token per text [B]."""
    return lambda logits_BTV: _select(logits_BTV[:, position], token)


def logit_difference(right: Any, wrong: Any, position: int = -1) -> Measure:
    """The difference of two tokens' logits at a position (arXiv 2211.00593 section 2)."""
    return lambda logits_BTV: _select(logits_BTV[:, position], right) - _select(logits_BTV[:, position], wrong)


def logprob(token: Any, position: int = -1) -> Measure:
    """The log-probability of a token at a position."""
    return lambda logits_BTV: _select(jax.nn.log_softmax(logits_BTV[:, position], axis=-1), token)


def loss(ids_BT: Any) -> Measure:
    """The mean loss per token of a decoder, in nats."""
    return lambda logits_BTV: nats(logits_BTV, ids_BT).mean(1)


def _select(x_BV: jax.Array, token: Any) -> jax.Array:
    tokens_B = jnp.broadcast_to(jnp.asarray(token), x_BV.shape[:1])
    return jnp.take_along_axis(x_BV, tokens_B[:, None], axis=-1)[:, 0]
