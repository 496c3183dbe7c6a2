"""Token embedding and unembedding, the first and the last layer of every model. Independent of blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes, parametrization
from gptjax.models.layers import Head, TokenEmbedding

SUPPRESSED_BIAS = -1e9  # of a logit whose token is suppressed


def suppress(params: Any, config: Any) -> Any:
    """Suppresses `config.suppress_tokens` by the head bias, which the model must have; returns the new parameters."""
    if not config.suppress_tokens:
        return params
    return {
        **params,
        "head_bias": jnp.asarray(params["head_bias"]).at[jnp.array(config.suppress_tokens)].set(SUPPRESSED_BIAS),
    }


class Embedder(nn.Module):
    """Token embedding and head; with a tied head both are the same matrix.

    Attributes:
      config: `config.model`; reads vocabulary, width, embedding_scale, tied_head, head_bias, logit_scale.
      dtype: of the arithmetic.
    """

    config: Any
    dtype: str

    def setup(self) -> None:
        """Declares the submodules, whose attributes name the parameters."""
        c = self.config
        self.tokens = TokenEmbedding(c.vocabulary, c.width, c.init_std, self.dtype)
        if not c.tied_head:
            self.head = Head(c.vocabulary, c.width, c.init_std, self.dtype, c.kernels)
        if c.head_bias:
            self.head_bias = logical_axes.parameter(self, "head_bias", nn.initializers.zeros, (c.vocabulary,))

    def embed(self, ids_BT: jax.Array, perturbation_BTD: jax.Array | None = None) -> jax.Array:
        """Embeds token ids, [B, T, D]: times `embedding_scale`, plus a perturbation if there is one."""
        x_BTD, scale = self.tokens(ids_BT), self.config.embedding_scale
        if scale != 1:
            x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
        return x_BTD if perturbation_BTD is None else x_BTD + perturbation_BTD.astype(x_BTD.dtype)

    def unembedding(self) -> jax.Array:
        """The unembedding matrix, one row per token, [V, D]; with a bias [V, D + 1], the bias as last column."""
        unembedding_VD = self.tokens.unembedding() if self.config.tied_head else self.head.unembedding()
        if not self.config.head_bias:
            return unembedding_VD
        return jnp.concatenate([unembedding_VD, self.head_bias.astype(unembedding_VD.dtype)[:, None]], axis=1)

    def pre_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scales x by `logit_scale`; with a head bias, appends a column of ones, which multiplies the bias."""
        scale = self.config.logit_scale * parametrization.output_multiplier(self.config)
        if scale != 1:
            x_BTD = x_BTD * jnp.asarray(scale, x_BTD.dtype)
        if not self.config.head_bias:
            return x_BTD
        return jnp.concatenate([x_BTD, jnp.ones((*x_BTD.shape[:-1], 1), x_BTD.dtype)], axis=-1)
