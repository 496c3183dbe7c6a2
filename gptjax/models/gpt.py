"""The GPT decoder: token ids in, logits out. One file for the whole family; a config says which member.

Knows nothing of text, losses or devices. The parts of a block come from dictionaries by name, so that a new norm,
activation, MLP or kind of position is one more entry in one of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import axes
from gptjax.models.attention import Attention
from gptjax.models.kernels.plain import unembed
from gptjax.models.layers import NORMS, Head, TokenEmbedding
from gptjax.models.mlp import MLPS
from gptjax.models.positions import POSITIONS, Places, places, restarting

Sublayer = Callable[[jax.Array], jax.Array]

# How a sublayer f and its norm join the residual stream x.
RESIDUALS: dict[str, Callable[[jax.Array, Sublayer, Sublayer], jax.Array]] = {
    "pre": lambda x, f, norm: x + f(norm(x)),  # arXiv 2002.04745
    "post": lambda x, f, norm: norm(x + f(x)),  # arXiv 1706.03762 section 3.1
}

# What a block's backward pass finds saved of its forward pass; the rest is computed again.
REMATS: dict[str, Any] = {
    "none": None,  # everything is saved
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products with parameters
}


class Stream(NamedTuple):
    """What goes from block to block."""

    x_BTD: jax.Array
    first_v_BTGK: jax.Array | None  # the first layer's values, with `config.value_residual`


class Layer(NamedTuple):
    """What differs between blocks besides their parameters."""

    number: int | jax.Array
    window: int | jax.Array  # 0: all the way back


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream: a Stream in, a Stream out."""

    config: Any
    dtype: str
    window: int | None = None  # where it is known before the program runs; else Layer's, and kernels may be slower

    @nn.compact
    def __call__(self, stream: Stream, layer: Layer, places: Places, deterministic: bool) -> tuple[Stream, None]:
        c = self.config
        attention = Attention(c, self.dtype, name="attention")
        mlp = MLPS[c.mlp](c, self.dtype, name="mlp")
        norm = partial(NORMS[c.norm], c.use_bias, c.norm_epsilon, c.kernels)
        norms = [norm(name=f"{part}_norm") for part in ("attention", "mlp")]
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        add = RESIDUALS[c.norm_position]
        first_v = stream.first_v_BTGK
        window = layer.window if self.window is None else self.window

        def read(x: jax.Array) -> jax.Array:
            nonlocal first_v
            mixed, first_v = attention(x, places, window, layer.number == 0, first_v, deterministic)
            return drop(mixed)

        x_BTD = axes.constrain(add(stream.x_BTD, read, norms[0]), "BTD")
        x_BTD = axes.constrain(add(x_BTD, lambda x: drop(mlp(x)), norms[1]), "BTD")
        return Stream(x_BTD, first_v), None


class GPT(nn.Module):
    """A decoder-only Transformer: ids_BT -> float32 logits_BTV, or what its head reads and the head's table.

    Attributes:
      config: `config.model` of a run; configs/base.py gives each key's meaning.
      dtype: of the arithmetic, by name; norms' statistics, softmax and logits are float32 whatever it is.
    """

    config: Any
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the parts, under the names that the parameters have."""
        c = self.config
        self.tokens = TokenEmbedding(c.vocabulary, c.width, c.init_std, self.dtype)
        add = POSITIONS[c.positions].add
        if add is not None:
            self.positions = add(c)
        self.drop = nn.Dropout(c.dropout)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMATS[c.remat], prevent_cse=not c.scan_layers, static_argnums=(4,))
        if c.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0, "losses": 0, "metrics": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.layers,
            )(c, self.dtype, c.windows[0] if len(set(c.windows)) == 1 else None)
        else:
            for i in range(c.layers):
                setattr(self, f"block_{i}", block(c, self.dtype, c.windows[i % len(c.windows)]))
        if c.norm_position == "pre":
            self.final_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)
        if not c.tied_head:
            self.head = Head(c.vocabulary, c.width, c.init_std, self.dtype)

    def __call__(
        self, ids_BT: jax.Array, segments_BT: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Logits for the token after each position, float32 [B, T, V]; arguments and errors as of `read`."""
        return unembed(self.read(ids_BT, segments_BT, deterministic), self.table(), self.config.logit_softcap)

    def read(self, ids_BT: jax.Array, segments_BT: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """What the head reads, [B, T, D].

        Args:
          ids_BT: token ids, T at most `config.context` where positions are learned.
          segments_BT: the number of each token's document, int32, in runs of equal ones, 0 for padding; each document
            is read as if it were alone. None: a row is one document.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T is more than the positions there are.
        """
        c = self.config
        x_BTD = self.tokens(ids_BT)
        positions_BT = None if segments_BT is None else restarting(segments_BT)
        if POSITIONS[c.positions].add is not None:
            x_BTD = self.positions(x_BTD, positions_BT)
        x_BTD = axes.constrain(self.drop(x_BTD, deterministic=deterministic), "BTD")
        x_BTD = self._through_blocks(x_BTD, positions_BT, segments_BT, deterministic)
        return self.final_norm(x_BTD) if c.norm_position == "pre" else x_BTD

    def table(self) -> jax.Array:
        """The head's rows, one a token, float32 [V, D]."""
        return self.tokens.table() if self.config.tied_head else self.head.table()

    def _through_blocks(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None, segments_BT: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        c = self.config
        B, T, _ = x_BTD.shape
        first_v = jnp.zeros((B, T, c.kv_heads, c.head_width), x_BTD.dtype) if c.value_residual else None
        positions = jnp.arange(T) if positions_BT is None else positions_BT
        stream, at = Stream(x_BTD, first_v), places(c, positions, segments_BT)
        windows = [c.windows[i % len(c.windows)] for i in range(c.layers)]
        if not c.scan_layers:
            for i, window in enumerate(windows):
                stream, _ = getattr(self, f"block_{i}")(stream, Layer(i, window), at, deterministic)
            return stream.x_BTD
        stream, _ = self.blocks(stream, Layer(jnp.arange(c.layers), jnp.array(windows)), at, deterministic)
        return stream.x_BTD
