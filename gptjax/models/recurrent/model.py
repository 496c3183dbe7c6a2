"""Recurrent models: an encoder, a decoder with optional attention to a source, and a language model.

Independent of text, losses and devices. States never cross segments of a row; padding is a segment like any other.
Layers are in cells.py, attention in attention.py, and the loop in scan.py.
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models.attention import CrossKV
from gptjax.models.cache import Cache
from gptjax.models.kernels.reference import pair_mask
from gptjax.models.layers import Dropout
from gptjax.models.model import Model
from gptjax.models.recurrent import cells
from gptjax.models.recurrent.attention import ATTENTIONS, AttentionStep, Source
from gptjax.models.recurrent.cells import CELLS, Kernel, Layer, State
from gptjax.models.recurrent.scan import Loop, Product, scan

Resets = tuple[jax.Array, tuple[State, ...]]  # resets_TB1, and each layer's state after a reset


class RecurrentEncoder(nn.Module):
    """Recurrent encoder: embedded tokens [B, S, D] -> [B, S, M]; M is 2D if bidirectional, forward columns first.

    The input of each layer is both directions of the layer below, as in `torch.nn.LSTM(bidirectional=True)`.

    Attributes:
      config: `config.model`; reads encoder_layers, bidirectional, width, dropout, use_bias, kernels.
      dtype: of the products.
      cell: of gptjax.models.recurrent.cells.CELLS.
    """

    config: Any
    dtype: str
    cell: str

    def setup(self) -> None:
        """Declares the layers: `forward_0` runs from the first token, `backward_0` from the last."""
        c = self.config
        self.directions = ("forward", "backward") if c.bidirectional else ("forward",)
        for i in range(c.encoder_layers):
            for direction in self.directions:
                input_width = c.width * (len(self.directions) if i else 1)
                setattr(self, f"{direction}_{i}", Layer(c, self.dtype, self.cell, input_width))
        self.drop = Dropout(c.dropout)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, deterministic: bool = True) -> jax.Array:
        """The encoder output, [B, S, M]; dropout applies to each layer's input and to the output (arXiv 1409.2329)."""
        initial = cells.zeros(self.cell, x_BSD.shape[0], self.config.width)
        x_SBD = x_BSD.swapaxes(0, 1)
        resets = [cells.segment_starts(segments_BS, direction == "backward") for direction in self.directions]
        for i in range(self.config.encoder_layers):
            x_SBD = self.drop(x_SBD.astype(self.dtype), deterministic=deterministic)
            outputs = [
                getattr(self, f"{direction}_{i}")(x_SBD, resets_SB1, initial, direction == "backward")[0]
                for direction, resets_SB1 in zip(self.directions, resets, strict=True)
            ]
            x_SBD = jnp.concatenate(outputs, axis=-1)
        return self.drop(x_SBD.swapaxes(0, 1).astype(x_BSD.dtype), deterministic=deterministic)


class DecoderState(NamedTuple):
    """State of a decoder, float32."""

    states: tuple[State, ...]  # by layer
    fed_BD: jax.Array | None  # the vector fed to the next step, with input feeding


class ProjectedSource(NamedTuple):
    """Encoder output, projected for a decoder's cache."""

    source: Source
    mask_BS: jax.Array
    states: tuple[State, ...]  # initial states


def memory_width(config: Any) -> int:
    """M, the width of the encoder output of `config.model`."""
    bidirectional = config.encoder in CELLS and config.bidirectional
    width: int = config.width
    return 2 * width if bidirectional else width


class RecurrentDecoder(nn.Module):
    """Recurrent decoder: embedded tokens [B, T, D] -> hidden states [B, T, D], with optional attention to a source.

    Without a source the initial states are 0. With one, each part of each layer's initial state is tanh(W m), m being
    the mean of the encoder output over the segment's source: arXiv 1409.0473 takes the backward state at the first
    word instead, which only a bidirectional encoder has.

    Attributes:
      config: `config.model`; reads layers, width, dropout, use_bias, kernels; with a source also encoder,
        bidirectional and attention.
      dtype: of the products.
      cell: of gptjax.models.recurrent.cells.CELLS.
      crosses: True if it attends to a source.
    """

    config: Any
    dtype: str
    cell: str
    crosses: bool = False

    def setup(self) -> None:
        """Declares the layers and the attention."""
        c, fed_width = self.config, 0
        if self.crosses:
            M = memory_width(c)
            self.attention = ATTENTIONS[c.attention](c, self.dtype, M)
            self.begin = Kernel(c, self.dtype, M, c.layers * CELLS[self.cell].parts * c.width)
            fed_width = ATTENTIONS[c.attention].fed_width(c.width, M)
        for i in range(c.layers):
            setattr(self, f"layer_{i}", Layer(c, self.dtype, self.cell, c.width, 0 if i else fed_width))
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        memory: CrossKV | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states of the last layer, [B, T, D].

        Args:
          x_BTD: embedded tokens.
          segments_BT: document number of each token, int32, in contiguous runs, 0 for padding; states are reset at the
            start of each document. None: a row is one document.
          memory: the encoder output; a document attends to the source of its number.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.
        """
        if memory is None:
            resets_TB1 = None if segments_BT is None else cells.segment_starts(segments_BT)
            return self._layer_by_layer(x_BTD, resets_TB1, self._zeros(x_BTD.shape[0]), deterministic)[0]
        mask_BTS = pair_mask(segments_BT, memory.segments_BS)
        mask_TBS = jnp.broadcast_to(mask_BTS, (*x_BTD.shape[:2], mask_BTS.shape[2])).swapaxes(0, 1)
        resets: Resets | None = None
        if segments_BT is None:
            states = self._initial_states(memory.x_BSM, mask_BTS[:, 0])
        else:
            initial_states = jax.vmap(self._initial_states, (None, 0))(memory.x_BSM, mask_TBS)
            resets, states = (cells.segment_starts(segments_BT), initial_states), self._zeros(x_BTD.shape[0])
        state = DecoderState(states, self._initial_fed(x_BTD.shape[0]))
        return self._step_by_step(x_BTD, resets, mask_TBS, self._source(memory), state, deterministic)[0]

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> DecoderState:
        """The initial state; its size does not depend on the number of tokens."""
        return DecoderState(self._zeros(rows), self._initial_fed(rows))

    def project_memory(self, memory: CrossKV) -> ProjectedSource:
        """Projects the encoder output for the decoder's cache."""
        mask_BS = pair_mask(None, memory.segments_BS)[:, 0]
        return ProjectedSource(self._source(memory), mask_BS, self._initial_states(memory.x_BSM, mask_BS))

    def extend(
        self,
        x_BTD: jax.Array,
        state: DecoderState,
        length_B: jax.Array,
        count_B: jax.Array,
        encoder_output: ProjectedSource | None = None,
    ) -> tuple[jax.Array, DecoderState]:
        """Runs the decoder on tokens that follow those of a state.

        Args:
          x_BTD: embedded tokens.
          state: after the earlier tokens.
          length_B: the number of earlier tokens of each row.
          count_B: the number of valid tokens of each row, at least 1; the output for the others is undefined, and they
            do not affect the state.
          encoder_output: from `project_memory`, if the decoder attends to a source.

        Returns:
          Hidden states of the last layer, [B, T, D], and the updated state.
        """
        if encoder_output is None:
            x_BTD, states = self._layer_by_layer(x_BTD, None, state.states, keep_all=True)
            return x_BTD, DecoderState(cells.select_steps(states, count_B), None)
        states = tuple(
            map(partial(cells.reset, resets_B1=(length_B == 0)[:, None]), state.states, encoder_output.states)
        )
        mask_TBS = jnp.broadcast_to(encoder_output.mask_BS, (x_BTD.shape[1], *encoder_output.mask_BS.shape))
        x_BTD, all_states = self._step_by_step(
            x_BTD, None, mask_TBS, encoder_output.source, DecoderState(states, state.fed_BD)
        )
        return x_BTD, cells.select_steps(all_states, count_B)

    def _layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{i}") for i in range(self.config.layers)]

    def _zeros(self, rows: int) -> tuple[State, ...]:
        return tuple(cells.zeros(self.cell, rows, self.config.width) for _ in range(self.config.layers))

    def _initial_fed(self, rows: int) -> jax.Array | None:
        """The vector fed to the first step."""
        feeds = self.crosses and not ATTENTIONS[self.config.attention].before
        return jnp.zeros((rows, self.config.width), jnp.float32) if feeds else None

    def _source(self, memory: CrossKV) -> Source:
        values_BSM = memory.x_BSM.astype(self.dtype)
        return Source(values_BSM, self.attention.key(values_BSM))

    def _initial_states(self, x_BSM: jax.Array, mask_BS: jax.Array) -> tuple[State, ...]:
        """Initial states of a segment, whose source the mask selects."""
        weights_BS = mask_BS / mask_BS.sum(-1, keepdims=True)
        mean_BM = jnp.einsum("bs,bsm->bm", weights_BS.astype(self.dtype), x_BSM.astype(self.dtype))
        parts = jnp.split(jnp.tanh(self.begin(mean_BM)), self.config.layers * CELLS[self.cell].parts, axis=-1)
        return tuple(zip(*[iter(parts)] * CELLS[self.cell].parts, strict=True))

    def _layer_by_layer(
        self,
        x_BTD: jax.Array,
        resets_TB1: jax.Array | None,
        states: tuple[State, ...],
        deterministic: bool = True,
        keep_all: bool = False,
    ) -> tuple[jax.Array, tuple[State, ...]]:
        """Runs layer by layer: returns hidden states, and each layer's states by step (all parts with `keep_all`)."""
        drop = partial(self.drop, deterministic=deterministic)
        x_TBD, all_states = x_BTD.swapaxes(0, 1), []
        for layer, state in zip(self._layers(), states, strict=True):
            updated = layer(drop(x_TBD.astype(self.dtype)), resets_TB1, state, keep_all=keep_all)
            x_TBD = updated[0]
            all_states.append(updated)
        return drop(x_TBD.swapaxes(0, 1).astype(x_BTD.dtype)), tuple(all_states)

    def _step_by_step(
        self,
        x_BTD: jax.Array,
        resets: Resets | None,
        mask_TBS: jax.Array,
        source: Source,
        state: DecoderState,
        deterministic: bool = True,
    ) -> tuple[jax.Array, DecoderState]:
        """Runs all layers step by step: returns hidden states, and the decoder's state after each step, time first."""
        c = self.config
        drop = partial(self.drop, deterministic=deterministic)
        layers, part = self._layers(), self.attention.loop_part(source)
        x_TBD = drop(x_BTD.swapaxes(0, 1).astype(self.dtype))
        equations, operands, biases = dict(part.equations), dict(part.operands), []
        for i, layer in enumerate(layers):
            kernel = layer.feed if i == 0 else layer.input
            equations |= {f"state_{i}": layer.state.equation(), f"input_{i}": kernel.equation()}
            operands |= {f"state_{i}": layer.state.kernel, f"input_{i}": kernel.kernel}
            biases.append((0.0 if i == 0 else layer.outer_bias(), layer.inner_bias()))
        drops = None
        if c.dropout and not deterministic:
            drops = [drop(jnp.ones((*mask_TBS.shape[:2], c.width))) for _ in layers[1:]]
        addends = {"input_0": layers[0].input(x_TBD) + layers[0].outer_bias()}
        step = partial(_attending_step, CELLS[self.cell], part.attend, self.attention.before)
        constants, xs = (part.constants, biases), (resets, mask_TBS, drops)
        _, outputs = scan(Loop(step, equations, self.dtype), operands, addends, constants, state, xs)
        if self.is_mutable_collection("attention"):  # for gptjax.interpret
            self.sow("attention", "weights_BHTS", outputs.weights_BS.swapaxes(0, 1)[:, None])
        x_TBD = self.attention.output(x_TBD, outputs.state.states[-1][0], outputs.fed)
        return drop(x_TBD.swapaxes(0, 1).astype(x_BTD.dtype)), outputs.state


class StepOutput(NamedTuple):
    """Output of a step of a decoder with attention."""

    state: DecoderState
    fed: jax.Array  # the attention's output, [B, M] or [B, D]
    weights_BS: jax.Array


def _attending_step(
    cell: cells.Cell, attend: AttentionStep, before: bool, product: Product, constants: Any, carry: DecoderState, x: Any
) -> tuple[DecoderState, StepOutput]:
    attention_constants, biases = constants
    resets, mask_BS, drops = x
    states, fed_BD = carry
    if resets is not None:
        resets_B1, initial_states = resets
        states = tuple(
            cells.reset(state, first, resets_B1) for state, first in zip(states, initial_states, strict=True)
        )
        fed_BD = None if fed_BD is None else jnp.where(resets_B1, 0.0, fed_BD)
    fed: Any = fed_BD
    if before:
        fed, weights_BS = attend(product, attention_constants, states[-1][0], mask_BS)
    updated: list[State] = []
    for i, state in enumerate(states):
        x_BD = fed if i == 0 else updated[-1][0] if drops is None else updated[-1][0] * drops[i - 1]
        input_bias, state_bias = biases[i]
        inputs_BP, states_BP = product(f"input_{i}", x_BD) + input_bias, product(f"state_{i}", state[0]) + state_bias
        updated.append(cell.step(inputs_BP, states_BP, state))
    if before:
        return DecoderState(tuple(updated), None), StepOutput(DecoderState(tuple(updated), None), fed, weights_BS)
    mixed, weights_BS = attend(product, attention_constants, updated[-1][0], mask_BS)
    return DecoderState(tuple(updated), mixed), StepOutput(DecoderState(tuple(updated), mixed), mixed, weights_BS)


class Recurrent(Model):
    """A language model of recurrent layers."""

    kind: ClassVar[str] = "decoder"
    extra_inputs: ClassVar[tuple[str, ...]] = ("segments_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the submodules; the decoder shares the model's scope."""
        super().setup()
        self.decoder = RecurrentDecoder(self.config, self.dtype, self.config.cell)
        nn.share_scope(self, self.decoder)

    def features(
        self,
        ids_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        perturbation_BTD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Output of the last layer, [B, T, D]; arguments are those of gptjax.models.gpt.GPT.features."""
        return self.decoder(self.embedder.embed(ids_BT, perturbation_BTD), segments_BT, None, deterministic)

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """Runs the model on tokens that follow those in the cache; see gptjax.models.gpt.GPT.extend."""
        x_BTD, state = self.decoder.extend(self.embedder.embed(ids_BT), cache.layers, cache.length_B, count_B)
        return self.embedder.pre_logits(x_BTD), Cache(state, cache.length_B + count_B)

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> DecoderState:
        """An empty cache; see gptjax.models.init_cache."""
        return self.decoder.init_cache(rows, capacity, ahead, dtype)
