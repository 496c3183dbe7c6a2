"""The two ends of every model: token ids to vectors, and vectors to what makes logits. No block is known here."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes, parametrization
from gptjax.models.layers import Head, TokenEmbedding

NEVER = -1e9  # a logit's bias that keeps its id out


def suppress(params: Any, config: Any) -> Any:
    """The parameters of a model with a head bias, so changed that it never says an id of `config.suppress_tokens`."""
    if not config.suppress_tokens:
        return params
    return {**params, "head_bias": jnp.asarray(params["head_bias"]).at[jnp.array(config.suppress_tokens)].set(NEVER)}


class Embedder(nn.Module):
    """The table of tokens, and the head's rows: the same table where the head is tied.

    Attributes:
      config: `config.model`; reads vocabulary, width, embedding_scale, tied_head, head_bias, logit_scale.
      dtype: of the arithmetic.
    """

    config: Any
    dtype: str

    def setup(self) -> None:
        """Declares the tables, under the names that the parameters have."""
        c = self.config
        self.tokens = TokenEmbedding(c.vocabulary, c.width, c.init_std, self.dtype)
        if not c.tied_head:
            self.head = Head(c.vocabulary, c.width, c.init_std, self.dtype, c.kernels)
        if c.head_bias:
            self.head_bias = logical_axes.parameter(self, "head_bias", nn.initializers.zeros, (c.vocabulary,))

    def embed(self, ids_BT: jax.Array, perturbation_BTD: jax.Array | None = None) -> jax.Array:
        """Tokens as vectors [B, T, D], times `embedding_scale`, and what is added to them, if anything is."""
        x_BTD, scale = self.tokens(ids_BT), self.config.embedding_scale
        if scale != 1:
            x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
        return x_BTD if perturbation_BTD is None else x_BTD + perturbation_BTD.astype(x_BTD.dtype)

    def table(self) -> jax.Array:
        """The head's rows, one a token, [V, D]; with a bias, its column too, [V, D + 1]."""
        table_VD = self.tokens.table() if self.config.tied_head else self.head.table()
        if not self.config.head_bias:
            return table_VD
        return jnp.concatenate([table_VD, self.head_bias.astype(table_VD.dtype)[:, None]], axis=1)

    def asked(self, x_BTD: jax.Array) -> jax.Array:
        """What the table is multiplied with: x times `logit_scale`, and with a bias, a one for its column."""
        scale = self.config.logit_scale * parametrization.multiplier(self.config)
        if scale != 1:
            x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
        if not self.config.head_bias:
            return x_BTD
        return jnp.concatenate([x_BTD, jnp.ones((*x_BTD.shape[:-1], 1), x_BTD.dtype)], axis=-1)
