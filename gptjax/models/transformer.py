"""A stack of Transformer blocks: of a decoder, of an encoder, or of a decoder that reads an encoder's memory.

Embedded tokens in, what a head reads out. Knows no tokens, no text, no losses. The parts of a block come from
dictionaries by name, so that a new norm, activation, MLP or kind of position is one more entry in one of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import cache, logical_axes
from gptjax.models.attention import Attention, CrossKV
from gptjax.models.cache import LayerCache
from gptjax.models.layers import NORMS, Dropout
from gptjax.models.mlp import MLPS
from gptjax.models.parametrization import depth_factor
from gptjax.models.positions import POSITIONS, PositionInfo, position_info, restarting

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


class ResidualStream(NamedTuple):
    """What goes from block to block."""

    x_BTD: jax.Array
    first_v_BTGK: jax.Array | None  # the first layer's values, with `config.value_residual`


class Layer(NamedTuple):
    """What differs between blocks besides their parameters."""

    number: int | jax.Array
    window: int | jax.Array  # 0: all the way back
    kept: LayerCache | None = None  # keys and values of the tokens before, where they are kept
    memory: CrossKV | None = None  # the encoder's, as this layer reads it, where it is kept


class Block(nn.Module):
    """Attention, reading of a memory where there is one, MLP, each added to the residual stream.

    A Stream in, a Stream and what is kept out.
    """

    config: Any
    dtype: str
    window: int | None = None  # where it is known before the program runs; else Layer's, and kernels may be slower
    causal: bool = True
    crosses: bool = False

    def setup(self) -> None:
        """Declares the sublayers and their norms."""
        c = self.config
        norm = partial(NORMS[c.norm], c.use_bias, c.norm_epsilon, c.kernels)
        self.attention, self.attention_norm = Attention(c, self.dtype, self.causal), norm()
        if self.crosses:
            self.cross, self.cross_norm = Attention(c, self.dtype, crosses=True), norm()
        self.mlp, self.mlp_norm = MLPS[c.mlp](c, self.dtype), norm()
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        stream: ResidualStream,
        layer: Layer,
        position_info: PositionInfo,
        deterministic: bool,
        memory: CrossKV | None = None,
    ) -> tuple[ResidualStream, Any]:
        """The stream after this block, and its cache."""
        add, deep = RESIDUALS[self.config.norm_position], depth_factor(self.config)
        first_v, kept = stream.first_v_BTGK, layer.kept
        window = layer.window if self.window is None else self.window

        def branch(y: jax.Array) -> jax.Array:
            return self.drop(y if deep == 1 else y * jnp.asarray(deep, y.dtype), deterministic=deterministic)

        def read(x: jax.Array) -> jax.Array:
            nonlocal first_v, kept
            mixed, first_v, kept = self.attention(
                x, position_info, window, layer.number == 0, first_v, deterministic, kept
            )
            return branch(mixed)

        def listen(x: jax.Array) -> jax.Array:
            heard: Any = layer.memory or memory
            return branch(self.cross.across(x, position_info.segments_BT, heard, deterministic))

        x_BTD = logical_axes.constrain(add(stream.x_BTD, read, self.attention_norm), "BTD")
        if self.crosses:
            x_BTD = logical_axes.constrain(add(x_BTD, listen, self.cross_norm), "BTD")
        x_BTD = logical_axes.constrain(add(x_BTD, lambda x: branch(self.mlp(x)), self.mlp_norm), "BTD")
        return ResidualStream(x_BTD, first_v), kept

    def remembered(self, memory: CrossKV) -> CrossKV:
        """The encoder's memory as this block reads it."""
        return self.cross.remembered(memory)


class Transformer(nn.Module):
    """Positions, blocks and the norm at their end: embedded tokens [B, T, D] -> what a head reads, [B, T, D].

    Attributes:
      config: `config.model` of a run; configs/base.py gives each key's meaning.
      dtype: of the arithmetic, by name; norms' statistics and softmax are float32 whatever it is.
      causal: whether a token reads only itself and those before it.
      crosses: whether it reads a memory too.
    """

    config: Any
    dtype: str = "float32"
    causal: bool = True
    crosses: bool = False

    def setup(self) -> None:
        """Declares the parts, under the names that the parameters have."""
        c = self.config
        scheme = POSITIONS[c.positions]
        if scheme.add is not None:
            self.positions = scheme.add(c)
        if scheme.relative is not None:
            self.relative = scheme.relative(c)
        if c.embedding_norm:
            self.embedding_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)
        self.drop = Dropout(c.dropout)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMATS[c.remat], prevent_cse=not c.scan_layers, static_argnums=(4,))
        if c.scan_layers:
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0, "losses": 0, "metrics": 0, "attention": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
            )(c, self.dtype, c.windows[0] if len(set(c.windows)) == 1 else None, self.causal, self.crosses)
        else:
            for i in range(c.layers):
                setattr(
                    self, f"block_{i}", block(c, self.dtype, c.windows[i % len(c.windows)], self.causal, self.crosses)
                )
        if c.norm_position == "pre":
            self.final_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        memory: CrossKV | None = None,
        deterministic: bool = True,
        bidirectional_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, [B, T, D].

        Args:
          x_BTD: embedded tokens, T at most `config.context` where positions are learned.
          segments_BT: the number of each token's document, int32, in runs of equal ones, 0 for padding; each document
            is read as if it were alone. None: a row is one document.
          memory: what to read besides; a document reads what has its number there.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.
          bidirectional_BT: 1 for tokens of its own that are read from before, too; None: as the trunk is.

        Raises:
          ValueError: T is more than the positions there are.
        """
        positions_BT = None if segments_BT is None else restarting(segments_BT)
        x_BTD = self._begun(x_BTD, positions_BT, deterministic)
        positions = jnp.arange(x_BTD.shape[1]) if positions_BT is None else positions_BT
        at = self._at(positions)._replace(segments_BT=segments_BT, bidirectional_BT=bidirectional_BT)
        layers = [Layer(i, self._window(i)) for i in range(self.config.layers)]
        return self._final(self._through_blocks(x_BTD, at, deterministic, layers, memory)[0])

    def empty(self, rows: int, capacity: int, ahead: int, dtype: str) -> tuple[LayerCache, ...]:
        """Keys and values of no token yet, by layer; see gptjax.models.cache.slots."""
        return cache.empty_layers(self.config, rows, capacity, ahead, dtype)

    def hear(self, memory: CrossKV) -> tuple[CrossKV, ...]:
        """A memory as each layer reads it, to be kept."""
        return tuple(getattr(self, f"block_{i}").remembered(memory) for i in range(self.config.layers))

    def extend(
        self,
        x_BTD: jax.Array,
        kept: Sequence[LayerCache],
        length_B: jax.Array,
        count_B: jax.Array,
        heard: Sequence[CrossKV] | None = None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """What the head reads, [B, T, D], of tokens that follow those that were kept, and all that is kept now.

        Args:
          x_BTD: embedded tokens, at most as many as the cache's `ahead`.
          kept: of the tokens before; rows may have different numbers of them.
          length_B: how many those are.
          count_B: how many tokens of each row are real, at least 1; what it gives for the others means nothing.
          heard: as `hear` gives it, where the trunk reads a memory.

        Raises:
          ValueError: layers are scanned; see gptjax.models.unrolled.
        """
        if self.config.scan_layers:
            raise ValueError("scanned layers cannot keep what they read; unroll them first")
        positions_BT = length_B[:, None] + jnp.arange(x_BTD.shape[1])
        x_BTD = self._begun(x_BTD, positions_BT, True)
        at = self._at(positions_BT)._replace(count_B=count_B)
        memories = heard or (None,) * len(kept)
        layers = [Layer(i, self._window(i), kept[i], memories[i]) for i in range(len(kept))]
        x_BTD, now = self._through_blocks(x_BTD, at, True, layers, None)
        return self._final(x_BTD), now

    def _window(self, layer: int) -> int:
        windows: Sequence[int] = self.config.windows
        return windows[layer % len(windows)]

    def _begun(self, x_BTD: jax.Array, positions_BT: jax.Array | None, deterministic: bool) -> jax.Array:
        if POSITIONS[self.config.positions].add is not None:
            x_BTD = self.positions(x_BTD, positions_BT)
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return logical_axes.constrain(self.drop(x_BTD, deterministic=deterministic), "BTD")

    def _at(self, positions: jax.Array) -> PositionInfo:
        relative = POSITIONS[self.config.positions].relative
        return position_info(self.config, positions)._replace(relative_RH=self.relative() if relative else None)

    def _through_blocks(
        self, x_BTD: jax.Array, at: PositionInfo, deterministic: bool, layers: Sequence[Layer], memory: CrossKV | None
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        c = self.config
        B, T, _ = x_BTD.shape
        first_v = jnp.zeros((B, T, c.kv_heads, c.head_width), x_BTD.dtype) if c.value_residual else None
        stream, now = ResidualStream(x_BTD, first_v), []
        if c.scan_layers:
            stacked = Layer(jnp.arange(c.layers), jnp.array([layer.window for layer in layers]))
            return self.blocks(stream, stacked, at, deterministic, memory)[0].x_BTD, ()
        for layer in layers:
            stream, kept = getattr(self, f"block_{layer.number}")(stream, layer, at, deterministic, memory)
            now.append(kept)
        return stream.x_BTD, tuple(now)

    def _final(self, x_BTD: jax.Array) -> jax.Array:
        return self.final_norm(x_BTD) if self.config.norm_position == "pre" else x_BTD
