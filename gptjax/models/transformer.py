"""A stack of Transformer blocks: a decoder, an encoder, or a decoder with cross-attention.

Maps embedded tokens to hidden states; independent of tokens, text and losses. The parts of a block come from
dictionaries by name: a new norm, activation, MLP or position encoding is one more entry in one of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.attention import Attention, CrossKV
from gptjax.models.cache import LayerCache, init_layers
from gptjax.models.layers import NORMS, Dropout
from gptjax.models.mlp import MLPS
from gptjax.models.parametrization import depth_factor
from gptjax.models.positions import POSITIONS, PositionInfo, position_info, segment_positions
from gptjax.models.residuals import RESIDUALS

# Rematerialization policies: what the forward pass of a block saves for its backward pass.
REMATS: dict[str, Any] = {
    "none": None,  # saves everything
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products with parameters
}


class ResidualStream(NamedTuple):
    """The state that blocks pass on."""

    x_BTD: jax.Array
    first_v_BTGK: jax.Array | None  # values of the first layer, with `config.value_residual`


class Layer(NamedTuple):
    """Inputs of a block that differ between layers."""

    number: int | jax.Array
    window: int | jax.Array  # 0: unlimited
    cache: LayerCache | None = None  # keys and values of earlier tokens, if cached
    memory: CrossKV | None = None  # the encoder output, projected by this layer, if cached


class Block(nn.Module):
    """Self-attention, optional cross-attention and MLP, each added to the residual stream."""

    config: Any
    dtype: str
    window: int | None = None  # None: that of Layer, known only at run time, which may select slower kernels
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
        """Returns the residual stream after this block, and the layer's cache."""
        deep = depth_factor(self.config)
        first_v, cache = stream.first_v_BTGK, layer.cache
        window = layer.window if self.window is None else self.window

        def branch(y: jax.Array) -> jax.Array:
            return self.drop(y if deep == 1 else y * jnp.asarray(deep, y.dtype), deterministic=deterministic)

        def attend(x: jax.Array) -> jax.Array:
            nonlocal first_v, cache
            mixed, first_v, cache = self.attention(
                x, position_info, window, layer.number == 0, first_v, deterministic, cache
            )
            return branch(mixed)

        def cross_attend(x: jax.Array) -> jax.Array:
            source: Any = layer.memory or memory
            return branch(self.cross.cross_attend(x, position_info.segments_BT, source, deterministic))

        sublayers = [
            (attend, self.attention_norm),
            *([(cross_attend, self.cross_norm)] if self.crosses else []),
            (lambda x: branch(self.mlp(x)), self.mlp_norm),
        ]
        constrain = partial(logical_axes.constrain, letters="BTD")
        x_BTD = RESIDUALS[self.config.norm_position].add(stream.x_BTD, sublayers, constrain)
        return ResidualStream(x_BTD, first_v), cache

    def project_memory(self, memory: CrossKV) -> CrossKV:
        """Projects the encoder output to the keys and values of this block."""
        return self.cross.project_memory(memory)


class Transformer(nn.Module):
    """Position encoding, blocks and final norm: embedded tokens [B, T, D] -> hidden states [B, T, D].

    Attributes:
      config: `config.model` of a run, see gptjax.models.options.
      dtype: of the arithmetic, by name; statistics of norms and softmax are always float32.
      causal: True if a token attends only to itself and earlier tokens.
      crosses: True if blocks have cross-attention.
    """

    config: Any
    dtype: str = "float32"
    causal: bool = True
    crosses: bool = False

    def setup(self) -> None:
        """Declares the submodules, whose attributes name the parameters."""
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
        if RESIDUALS[c.norm_position].final_norm:
            self.final_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        memory: CrossKV | None = None,
        deterministic: bool = True,
        bidirectional_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D].

        Args:
          x_BTD: embedded tokens, T at most `config.context` with learned positions.
          segments_BT: document number of each token, int32, in contiguous runs, 0 for padding; tokens attend only
            within their document, and positions restart in each. None: a row is one document.
          memory: the encoder output; a document attends to the source of its number.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.
          bidirectional_BT: 1 for tokens that earlier tokens attend to as well; None: as `causal` says.

        Raises:
          ValueError: T exceeds the number of learned positions.
        """
        positions_BT = None if segments_BT is None else segment_positions(segments_BT)
        x_BTD = self._embed(x_BTD, positions_BT, deterministic)
        positions = jnp.arange(x_BTD.shape[1]) if positions_BT is None else positions_BT
        info = self._position_info(positions)._replace(segments_BT=segments_BT, bidirectional_BT=bidirectional_BT)
        layers = [Layer(i, self._window(i)) for i in range(self.config.layers)]
        return self._normalize(self._through_blocks(x_BTD, info, deterministic, layers, memory)[0])

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> tuple[LayerCache, ...]:
        """Initializes empty caches by layer; see gptjax.models.cache.num_slots."""
        return init_layers(self.config, rows, capacity, ahead, dtype)

    def project_memory(self, memory: CrossKV) -> tuple[CrossKV, ...]:
        """Projects the encoder output to the keys and values of each layer."""
        return tuple(getattr(self, f"block_{i}").project_memory(memory) for i in range(self.config.layers))

    def extend(
        self,
        x_BTD: jax.Array,
        cache: Sequence[LayerCache],
        length_B: jax.Array,
        count_B: jax.Array,
        encoder_output: Sequence[CrossKV] | None = None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Runs the blocks on tokens that follow those in the caches.

        Args:
          x_BTD: embedded tokens, at most as many as the cache's `ahead`.
          cache: of earlier tokens, by layer; rows may have different lengths.
          length_B: the number of earlier tokens of each row.
          count_B: the number of valid tokens of each row, at least 1; the output for the others is undefined.
          encoder_output: from `project_memory`, if blocks have cross-attention.

        Returns:
          Hidden states after the final norm, [B, T, D], and the updated caches.

        Raises:
          ValueError: layers are scanned; see gptjax.models.unroll_layers.
        """
        if self.config.scan_layers:
            raise ValueError("scanned layers have no cache; unroll them first")
        positions_BT = length_B[:, None] + jnp.arange(x_BTD.shape[1])
        x_BTD = self._embed(x_BTD, positions_BT, True)
        info = self._position_info(positions_BT)._replace(count_B=count_B)
        memories = encoder_output or (None,) * len(cache)
        layers = [Layer(i, self._window(i), cache[i], memories[i]) for i in range(len(cache))]
        x_BTD, extended = self._through_blocks(x_BTD, info, True, layers, None)
        return self._normalize(x_BTD), extended

    def _window(self, layer: int) -> int:
        windows: Sequence[int] = self.config.windows
        return windows[layer % len(windows)]

    def _embed(self, x_BTD: jax.Array, positions_BT: jax.Array | None, deterministic: bool) -> jax.Array:
        if POSITIONS[self.config.positions].add is not None:
            x_BTD = self.positions(x_BTD, positions_BT)
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return logical_axes.constrain(self.drop(x_BTD, deterministic=deterministic), "BTD")

    def _position_info(self, positions: jax.Array) -> PositionInfo:
        relative = POSITIONS[self.config.positions].relative
        return position_info(self.config, positions)._replace(relative_RH=self.relative() if relative else None)

    def _through_blocks(
        self, x_BTD: jax.Array, info: PositionInfo, deterministic: bool, layers: Sequence[Layer], memory: CrossKV | None
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        c = self.config
        B, T, _ = x_BTD.shape
        first_v = jnp.zeros((B, T, c.kv_heads, c.head_width), x_BTD.dtype) if c.value_residual else None
        stream, caches = ResidualStream(x_BTD, first_v), []
        if c.scan_layers:
            stacked = Layer(jnp.arange(c.layers), jnp.array([layer.window for layer in layers]))
            return self.blocks(stream, stacked, info, deterministic, memory)[0].x_BTD, ()
        for layer in layers:
            stream, cache = getattr(self, f"block_{layer.number}")(stream, layer, info, deterministic, memory)
            caches.append(cache)
        return stream.x_BTD, tuple(caches)

    def _normalize(self, x_BTD: jax.Array) -> jax.Array:
        return self.final_norm(x_BTD) if RESIDUALS[self.config.norm_position].final_norm else x_BTD
