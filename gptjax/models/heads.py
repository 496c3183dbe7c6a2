"""Task heads: classification, regression, multiple choice, tagging, spans and text embeddings, on any model.

Independent of the names of labels and of losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes, parametrization
from gptjax.models.layers import Dropout, Linear


def first(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The first token, [B, D]."""
    return x_BTD[:, 0]


def last(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The last token that is not padding, [B, D]: the one that attends to the whole text under a causal mask."""
    T = x_BTD.shape[1]
    index_B = jnp.max(jnp.where(mask_BT, jnp.arange(T), 0), axis=1)
    return jnp.take_along_axis(x_BTD, index_B[:, None, None], axis=1)[:, 0]


def mean(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of the tokens that are not padding, [B, D]."""
    weights_BT1 = mask_BT.astype(jnp.float32)[..., None]
    return (x_BTD * weights_BT1).sum(1) / jnp.maximum(weights_BT1.sum(1), 1)


POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "first": first,
    "last": last,
    "mean": mean,
    "pooler": first,  # followed by a linear layer and tanh, as in BERT
}


class Head(NamedTuple):
    """Output of a kind of task."""

    pools: bool  # one output per row, not one per token
    outputs: int | None  # features of an output; None: `config.labels`, 0: the pooled vector itself
    squeezes: bool = False  # drops the axis of a single feature


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
    """Maps features [B, T, D] to the output of a task, float32; dropout precedes the product, as in BERT.

    Attributes:
      config: `config.model`; reads task, labels, pooling, dropout, width, init_std.
      dtype: of the arithmetic.
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, labels], [B, T, labels], [B, T, 2], [B] or [B, D]; `mask_BT` is False for padding."""
        c = self.config
        head, y = HEADS[c.task], x_BTD
        if head.pools:
            y = POOLINGS[c.pooling](x_BTD, mask_BT)
            if c.pooling == "pooler":
                pooler = Linear(c.width, True, c.init_std, self.dtype, c.kernels, name="pooler")
                y = jnp.tanh(pooler(y))
        if head.outputs == 0:
            return y.astype(jnp.float32)
        y = Dropout(c.dropout)(y * parametrization.output_multiplier(c), deterministic)
        shape = c.width, head.outputs or c.labels
        kernel = logical_axes.parameter(self, "kernel", nn.initializers.normal(c.init_std), shape)
        bias = logical_axes.parameter(self, "bias", nn.initializers.zeros, shape[1:])
        y = jnp.dot(y.astype(jnp.float32), kernel) + bias
        return y[..., 0] if head.squeezes else y
