"""Attention of recurrent decoders: which tokens of a source each step reads, and how that goes into the next one.

Additive (arXiv 1409.0473): the state before a step is the query, and what it reads goes into the step. Multiplicative
(arXiv 1508.04025): the state after it is the query, and what comes of both goes into the next step ("input feeding",
section 3.3). In either the query is the last layer's, and the first layer is fed.
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
    """A source as a decoder's steps read it."""

    values_BSM: jax.Array
    keys_BSD: jax.Array  # float32


# (product, constants, h_BD, mask_BS) -> what is fed, and the weights [B, S]
Read = Callable[[Product, Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Inside(NamedTuple):
    """What of an attention is in a loop.

    Attributes:
      read: of each step.
      equations, operands: of its products, see gptjax.models.recurrent.scan.
      constants: what else it reads there.
    """

    read: Read
    equations: dict[str, str]
    operands: dict[str, jax.Array]
    constants: Any


class Additive(nn.Module):
    """Score v . tanh(W s + U h) of the state s before a step and the source's h (arXiv 1409.0473 appendix A.1.2).

    What is read goes into the step. The head reads the maximum of each two columns of a product with the state after
    the step, the embedded token and what was read (appendix A.2.2; there with the state before the step).

    Attributes:
      config: `config.model`; reads width, kernels.
      dtype: of the products.
      memory: M, columns of the source.
    """

    config: Any
    dtype: str
    memory: int

    before: ClassVar[bool] = True  # whether the state before the step is the query

    def setup(self) -> None:
        """Declares the parameters."""
        c, D, M = self.config, self.config.width, self.memory
        self.query = Kernel(c, self.dtype, D, D)
        self.key = Kernel(c, self.dtype, M, D)
        self.score = logical_axes.parameter(self, "score", nn.initializers.normal(D**-0.5), (D,))
        self.readout = Kernel(c, self.dtype, 2 * D + M, 2 * D)

    @staticmethod
    def feeds(width: int, memory: int) -> int:
        """Columns of what the first layer is fed."""
        return memory

    def inside(self, source: Source) -> Inside:
        """What of it a loop has."""
        equations = {"query": self.query.equation(), "values": "bs,bsm->bm"}
        operands = {"query": self.query.kernel, "values": source.values_BSM}

        def read(product: Product, constants: Any, h_BD: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys_BSD, score_D = constants
            weights_BS = shares(scores(product("query", h_BD), keys_BSD, score_D), mask_BS)
            return product("values", weights_BS), weights_BS

        return Inside(read, equations, operands, (source.keys_BSD, self.score))

    def finished(self, x_TBD: jax.Array, h_TBD: jax.Array, read_TBM: jax.Array) -> jax.Array:
        """What the head reads, [T, B, D], of embedded tokens, states and what was read."""
        pairs = self.readout(jnp.concatenate([h_TBD, x_TBD, read_TBM], axis=-1))
        return pairs.reshape(*pairs.shape[:-1], -1, 2).max(-1)


# Computed again in the backward pass: saving S times D numbers a step takes longer.
@partial(jax.checkpoint, prevent_cse=False)
def scores(query_BD: jax.Array, keys_BSD: jax.Array, score_D: jax.Array) -> jax.Array:
    """v . tanh(query + key), [B, S]."""
    return jnp.einsum("bsd,d->bs", jnp.tanh(query_BD[:, None] + keys_BSD), score_D)


class Multiplicative(nn.Module):
    """Score h . W h_s of the state h after a step and the source's h_s (arXiv 1508.04025 eq. 8, "general").

    What is read, c, makes tanh(W [c; h]) (eq. 5), which both the next step and the head read. As Additive otherwise.
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
    def feeds(width: int, memory: int) -> int:
        """Columns of what the first layer is fed."""
        return width

    def inside(self, source: Source) -> Inside:
        """What of it a loop has."""
        equations = {"keys": "bd,bsd->bs", "values": "bs,bsm->bm", "mix": self.mix.equation()}
        operands = {"keys": source.keys_BSD, "values": source.values_BSM, "mix": self.mix.kernel}

        def read(product: Product, constants: Any, h_BD: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights_BS = shares(product("keys", h_BD), mask_BS)
            read_BM = product("values", weights_BS)
            return jnp.tanh(product("mix", jnp.concatenate([read_BM, h_BD], axis=-1))), weights_BS

        return Inside(read, equations, operands, None)

    def finished(self, x_TBD: jax.Array, h_TBD: jax.Array, read_TBD: jax.Array) -> jax.Array:
        """What the head reads: what was made of it in the loop."""
        return read_TBD


def shares(scores_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """The softmax of scores where the mask is True, and 0 elsewhere."""
    return jax.nn.softmax(jnp.where(mask_BS, scores_BS, -jnp.inf), axis=-1)


ATTENTIONS: dict[str, type[Additive] | type[Multiplicative]] = {"additive": Additive, "multiplicative": Multiplicative}
