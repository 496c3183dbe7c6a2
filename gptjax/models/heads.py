"""Task heads: what a trunk read, turned into answers about a text, a token, a span or a choice.

A head goes on any trunk. Nothing here knows labels' names or losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes, parametrization
from gptjax.models.layers import Dropout, Linear


def first(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The first token, [B, D]."""
    return x_BTD[:, 0]


def last(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The last real token, [B, D]: the one that has read the whole text where attention is causal."""
    T = x_BTD.shape[1]
    at_B = jnp.max(jnp.where(real_BT, jnp.arange(T), 0), axis=1)
    return jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]


def mean(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The mean of the real tokens, [B, D]."""
    weights_BT1 = real_BT.astype(jnp.float32)[..., None]
    return (x_BTD * weights_BT1).sum(1) / jnp.maximum(weights_BT1.sum(1), 1)


POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "first": first,
    "last": last,
    "mean": mean,
    "pooler": first,  # through a layer of its own with a tanh, as BERT has it
}


class Head(NamedTuple):
    """A kind of answer."""

    pools: bool  # one answer a row, not one a token
    outputs: int | None  # numbers of an answer; None: `config.labels`, 0: the pooled vector itself
    squeezes: bool = False  # a single number of an answer has no axis


HEADS: dict[str, Head] = {
    "none": Head(False, 0),
    "classification": Head(True, None),
    "regression": Head(True, 1, True),
    "choice": Head(True, 1, True),
    "tagging": Head(False, None),
    "span": Head(False, 2),
    "embedding": Head(True, 0),
}


class TaskHead(nn.Module):
    """What a trunk read, [B, T, D], to answers, float32; dropout before the product, as BERT has it.

    Attributes:
      config: `config.model`; reads task, labels, pooling, dropout, width, init_std.
      dtype: of the arithmetic.
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, labels], [B, T, labels], [B, T, 2], [B] or [B, D]; `real_BT` is True where a token is no padding."""
        c = self.config
        head, answer = HEADS[c.task], x_BTD
        if head.pools:
            answer = POOLINGS[c.pooling](x_BTD, real_BT)
            if c.pooling == "pooler":
                pooler = Linear(c.width, True, c.init_std, self.dtype, c.kernels, name="pooler")
                answer = jnp.tanh(pooler(answer))
        if head.outputs == 0:
            return answer.astype(jnp.float32)
        answer = Dropout(c.dropout)(answer * parametrization.multiplier(c), deterministic)
        shape = c.width, head.outputs or c.labels
        kernel = logical_axes.parameter(self, "kernel", nn.initializers.normal(c.init_std), shape)
        bias = logical_axes.parameter(self, "bias", nn.initializers.zeros, shape[1:])
        answer = jnp.dot(answer.astype(jnp.float32), kernel) + bias
        return answer[..., 0] if head.squeezes else answer
