"""The GPT decoder: token ids in, logits out. One file for the whole family; a config says which member.

Knows nothing of text, losses or devices. The parts of a block come from dictionaries by name, so that a new norm,
activation, MLP or kind of position is one more entry in one of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from gptjax.models.attention import Attention
from gptjax.models.layers import NORMS, POSITIONS, Linear, TokenEmbedding
from gptjax.models.mlp import MLPS

Sublayer = Callable[[jax.Array], jax.Array]

# How a sublayer f and its norm join the residual stream x.
RESIDUALS: dict[str, Callable[[jax.Array, Sublayer, Sublayer], jax.Array]] = {
    "pre": lambda x, f, norm: x + f(norm(x)),
}


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream: x_BTD -> [B, T, D].

    The products that write to the stream start 1/sqrt(2L) smaller, so that its size does not grow with depth
    (GPT-2, "Language Models are Unsupervised Multitask Learners", section 2.3).
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
        c = self.config
        shared = dict(use_bias=c.use_bias, out_init_std=0.02 / math.sqrt(2 * c.layers), dtype=self.dtype)
        attention = Attention(c.heads, c.kv_heads, dropout=c.dropout, name="attention", **shared)
        mlp = MLPS[c.mlp](c.mlp_width, c.activation, name="mlp", **shared)
        norms = [NORMS[c.norm](use_bias=c.use_bias, name=f"{part}_norm") for part in ("attention", "mlp")]
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        add = RESIDUALS[c.norm_position]
        x_BTD = add(x_BTD, lambda x: drop(attention(x, deterministic)), norms[0])
        return add(x_BTD, lambda x: drop(mlp(x)), norms[1])


class GPT(nn.Module):
    """A decoder-only Transformer: ids_BT -> float32 logits_BTV.

    Attributes:
      config: `config.model` of a run; configs/base.py gives each key's meaning.
      dtype: of the arithmetic, by name; norms' statistics, softmax and logits are float32 whatever it is.
    """

    config: Any
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids_BT: jax.Array, deterministic: bool = True) -> jax.Array:
        """Logits for the token after each position.

        Args:
          ids_BT: token ids, T at most `config.context`.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T is more than the positions there are.
        """
        c = self.config
        tokens = TokenEmbedding(c.vocabulary, c.width, dtype=self.dtype, name="tokens")
        x_BTD = POSITIONS[c.positions](c.context, name="positions")(tokens(ids_BT))
        x_BTD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD)
        for layer in range(c.layers):
            x_BTD = Block(c, self.dtype, name=f"block_{layer}")(x_BTD, deterministic)
        x_BTD = NORMS[c.norm](use_bias=c.use_bias, name="final_norm")(x_BTD)
        if c.tied_head:
            return tokens.logits(x_BTD)
        return Linear(c.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x_BTD).astype("float32")
