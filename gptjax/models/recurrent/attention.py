"""Attention of recurrent decoders to a source.

Additive (arXiv 1409.0473): the query is the state before a step, and the context vector is an input of the step.
Multiplicative (arXiv 1508.04025): the query is the state after a step, and the attentional hidden state is an input of
the next step ("input feeding", section 3.3). The query is the last layer's state, and the first layer is fed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.recurrent.cells import Kernel
from gptjax.models.recurrent.scan import Product


class Source(NamedTuple):
    """Keys and values of a source."""

    values_BSM: jax.Array
    keys_BSD: jax.Array  # float32


# (product, constants, h_BD, mask_BS) -> the fed vector, and the attention weights [B, S]
AttentionStep = Callable[[Product, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class LoopPart(NamedTuple):
    """The part of an attention that runs in the decoder's loop.

    Attributes:
      attend: computes attention in each step.
      equations, operands: of its products, see gptjax.models.recurrent.scan.
      constants: other inputs of every step.
    """

    attend: AttentionStep
    equations: dict[str, str]
    operands: dict[str, jax.Array]
    constants: Any


class Additive(nn.Module):
    """Score v . tanh(W s + U h) of the state s before a step and the source's h (arXiv 1409.0473 appendix A.1.2).

    The context vector is an input of the step. The output is a maxout over pairs of columns of a product with the state
    after the step, the embedded token and the context vector (appendix A.2.2; there with the state before the step).

    Attributes:
      config: `config.model`; reads width, kernels.
      dtype: of the products.
      memory: M, columns of the source.
    """

    config: Any
    dtype: str
    memory: int

    before: ClassVar[bool] = True  # True if the query is the state before the step

    def setup(self) -> None:
        """Declares the parameters."""
        c, D, M = self.config, self.config.width, self.memory
        self.query = Kernel(c, self.dtype, D, D)
        self.key = Kernel(c, self.dtype, M, D)
        self.score = logical_axes.parameter(self, "score", nn.initializers.normal(D**-0.5), (D,))
        self.readout = Kernel(c, self.dtype, 2 * D + M, 2 * D)

    @staticmethod
    def fed_width(width: int, memory: int) -> int:
        """Columns of the vector that is fed to the first layer."""
        return memory

    def loop_part(self, source: Source) -> LoopPart:
        """Returns the part that runs in the decoder's loop."""
        equations = {"query": self.query.equation(), "values": "bs,bsm->bm"}
        operands = {"query": self.query.kernel, "values": source.values_BSM}

        def attend(
            product: Product, constants: Any, h_BD: jax.Array, mask_BS: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            keys_BSD, score_D = constants
            weights_BS = masked_softmax(scores(product("query", h_BD), keys_BSD, score_D), mask_BS)
            return product("values", weights_BS), weights_BS

        return LoopPart(attend, equations, operands, (source.keys_BSD, self.score))

    def output(self, x_TBD: jax.Array, h_TBD: jax.Array, context_TBM: jax.Array) -> jax.Array:
        """The decoder's output, [T, B, D], from embedded tokens, states and context vectors."""
        pairs = self.readout(jnp.concatenate([h_TBD, x_TBD, context_TBM], axis=-1))
        return pairs.reshape(*pairs.shape[:-1], -1, 2).max(-1)


# Rematerialized: saving S times D numbers per step takes longer.
@partial(jax.checkpoint, prevent_cse=False)
def scores(query_BD: jax.Array, keys_BSD: jax.Array, score_D: jax.Array) -> jax.Array:
    """v . tanh(query + key), [B, S]."""
    return jnp.einsum("bsd,d->bs", jnp.tanh(query_BD[:, None] + keys_BSD), score_D)


class Multiplicative(nn.Module):
    """Score h . W h_s of the state h after a step and the source's h_s (arXiv 1508.04025 eq. 8, "general").

    The attentional hidden state tanh(W [c; h]) of the context vector c (eq. 5) is an input of the next step, and the
    output. Otherwise as Additive.
    """

    config: Any
    dtype: str
    memory: int

    before: ClassVar[bool] = False

    def setup(self) -> None:
        """Declares the parameters."""
        c, D, M = self.config, self.config.width, self.memory
        self.key = Kernel(c, self.dtype, M, D)
        self.mix = Kernel(c, self.dtype, M + D, D)

    @staticmethod
    def fed_width(width: int, memory: int) -> int:
        """Columns of the vector that is fed to the first layer."""
        return width

    def loop_part(self, source: Source) -> LoopPart:
        """Returns the part that runs in the decoder's loop."""
        equations = {"keys": "bd,bsd->bs", "values": "bs,bsm->bm", "mix": self.mix.equation()}
        operands = {"keys": source.keys_BSD, "values": source.values_BSM, "mix": self.mix.kernel}

        def attend(
            product: Product, constants: Any, h_BD: jax.Array, mask_BS: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            weights_BS = masked_softmax(product("keys", h_BD), mask_BS)
            context_BM = product("values", weights_BS)
            return jnp.tanh(product("mix", jnp.concatenate([context_BM, h_BD], axis=-1))), weights_BS

        return LoopPart(attend, equations, operands, None)

    def output(self, x_TBD: jax.Array, h_TBD: jax.Array, context_TBD: jax.Array) -> jax.Array:
        """The decoder's output: the attentional hidden states of the loop."""
        return context_TBD


def masked_softmax(scores_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Softmax over the scores where the mask is True, 0 elsewhere."""
    return jax.nn.softmax(jnp.where(mask_BS, scores_BS, -jnp.inf), axis=-1)


ATTENTIONS: dict[str, type[Additive] | type[Multiplicative]] = {"additive": Additive, "multiplicative": Multiplicative}
