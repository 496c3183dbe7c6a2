"""Recurrent models: an encoder, a decoder that may read an encoder's memory, and a language model of its own.

Knows nothing of text, losses or devices. A state never passes from one segment of a row to another; padding is a
segment like any other. Layers and attention are in cells.py and alignment.py; both loops are those of loops.py.
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
from gptjax.models.recurrent.attention import ATTENTIONS, Read, Source
from gptjax.models.recurrent.cells import CELLS, Kernel, Layer, State
from gptjax.models.recurrent.scan import Loop, Product, scan

Begins = tuple[jax.Array, tuple[State, ...]]  # begins_TB1, and each layer's state where something begins


class RecurrentEncoder(nn.Module):
    """Embedded tokens [B, S, D] -> [B, S, M]; M is 2D where it reads in both directions, the forward one's first.

    Each layer reads both directions of the one below, as `torch.nn.LSTM(bidirectional=True)` has it.

    Attributes:
      config: `config.model`; reads encoder_layers, bidirectional, width, dropout, use_bias, kernels.
      dtype: of the products.
      cell: of gptjax.models.recurrent.cells.CELLS.
    """

    config: Any
    dtype: str
    cell: str

    def setup(self) -> None:
        """Declares the layers: `forward_0` reads from the first token on, `backward_0` from the last."""
        c = self.config
        self.ways = ("forward", "backward") if c.bidirectional else ("forward",)
        for i in range(c.encoder_layers):
            for way in self.ways:
                reads = c.width * (len(self.ways) if i else 1)
                setattr(self, f"{way}_{i}", Layer(c, self.dtype, self.cell, reads))
        self.drop = Dropout(c.dropout)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, deterministic: bool = True) -> jax.Array:
        """What the decoder reads; dropout is of what each layer reads and of what the last one gives (1409.2329)."""
        first = cells.zeros(self.cell, x_BSD.shape[0], self.config.width)
        x_SBD = x_BSD.swapaxes(0, 1)
        begins = [cells.beginnings(segments_BS, way == "backward") for way in self.ways]
        for i in range(self.config.encoder_layers):
            x_SBD = self.drop(x_SBD.astype(self.dtype), deterministic=deterministic)
            given = [
                getattr(self, f"{way}_{i}")(x_SBD, begins_SB1, first, way == "backward")[0]
                for way, begins_SB1 in zip(self.ways, begins, strict=True)
            ]
            x_SBD = jnp.concatenate(given, axis=-1)
        return self.drop(x_SBD.swapaxes(0, 1).astype(x_BSD.dtype), deterministic=deterministic)


class Kept(NamedTuple):
    """What a decoder knows of the tokens that it has read, float32."""

    states: tuple[State, ...]  # of each layer
    fed_BD: jax.Array | None  # what the next step is fed of a source, where the one before made it


class Heard(NamedTuple):
    """A source as a decoder reads it token by token."""

    source: Source
    mask_BS: jax.Array
    states: tuple[State, ...]  # before the first token


def memory_width(config: Any) -> int:
    """M, the columns of what the encoder of `config.model` gives."""
    both_ways = config.encoder in CELLS and config.bidirectional
    width: int = config.width
    return 2 * width if both_ways else width


class RecurrentDecoder(nn.Module):
    """Embedded tokens [B, T, D] -> what a head reads, [B, T, D]; where it crosses, with attention to a memory.

    Without a memory states begin as 0. With one, each part of each layer's state begins as tanh(W m), m the mean of
    what the encoder made of the segment's source: arXiv 1409.0473 has the backward state at its first word instead,
    which only a bidirectional encoder has.

    Attributes:
      config: `config.model`; reads layers, width, dropout, use_bias, kernels; of memories encoder,
        bidirectional and attention.
      dtype: of the products.
      cell: of gptjax.models.recurrent.cells.CELLS.
      crosses: whether it reads a memory.
    """

    config: Any
    dtype: str
    cell: str
    crosses: bool = False

    def setup(self) -> None:
        """Declares the layers, and what reads the memory."""
        c, feeds = self.config, 0
        if self.crosses:
            M = memory_width(c)
            self.attention = ATTENTIONS[c.attention](c, self.dtype, M)
            self.begin = Kernel(c, self.dtype, M, c.layers * CELLS[self.cell].parts * c.width)
            feeds = ATTENTIONS[c.attention].feeds(c.width, M)
        for i in range(c.layers):
            setattr(self, f"layer_{i}", Layer(c, self.dtype, self.cell, c.width, 0 if i else feeds))
        self.drop = Dropout(c.dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        memory: CrossKV | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """What the head reads, [B, T, D].

        Args:
          x_BTD: embedded tokens.
          segments_BT: the number of each token's document, int32, in runs of equal ones, 0 for padding; each document
            is read as if it were alone. None: a row is one document.
          memory: what to read besides; a document reads what has its number there.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.
        """
        if memory is None:
            begins_TB1 = None if segments_BT is None else cells.beginnings(segments_BT)
            return self._plain(x_BTD, begins_TB1, self._zeros(x_BTD.shape[0]), deterministic)[0]
        mask_BTS = pair_mask(segments_BT, memory.segments_BS)
        mask_TBS = jnp.broadcast_to(mask_BTS, (*x_BTD.shape[:2], mask_BTS.shape[2])).swapaxes(0, 1)
        begins: Begins | None = None
        if segments_BT is None:
            states = self._first(memory.x_BSM, mask_BTS[:, 0])
        else:
            firsts = jax.vmap(self._first, (None, 0))(memory.x_BSM, mask_TBS)
            begins, states = (cells.beginnings(segments_BT), firsts), self._zeros(x_BTD.shape[0])
        kept = Kept(states, self._unfed(x_BTD.shape[0]))
        return self._attending(x_BTD, begins, mask_TBS, self._source(memory), kept, deterministic)[0]

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> Kept:
        """What is kept of no tokens yet; states take no more room for more tokens."""
        return Kept(self._zeros(rows), self._unfed(rows))

    def project_memory(self, memory: CrossKV) -> Heard:
        """A memory as it is read, to be kept."""
        mask_BS = pair_mask(None, memory.segments_BS)[:, 0]
        return Heard(self._source(memory), mask_BS, self._first(memory.x_BSM, mask_BS))

    def extend(
        self, x_BTD: jax.Array, kept: Kept, length_B: jax.Array, count_B: jax.Array, encoder_output: Heard | None = None
    ) -> tuple[jax.Array, Kept]:
        """What the head reads, [B, T, D], of tokens that follow those that were read, and what is kept now.

        Args:
          x_BTD: embedded tokens.
          kept: of the tokens before.
          length_B: how many those are.
          count_B: how many tokens of each row are real, at least 1; what it gives for the others means nothing, and
            they leave no trace in what is kept.
          encoder_output: as `project_memory` gives it, where the decoder crosses.
        """
        if encoder_output is None:
            x_BTD, states = self._plain(x_BTD, None, kept.states, keeps=True)
            return x_BTD, Kept(cells.after(states, count_B), None)
        states = tuple(
            map(partial(cells.begun, begins_B1=(length_B == 0)[:, None]), kept.states, encoder_output.states)
        )
        mask_TBS = jnp.broadcast_to(encoder_output.mask_BS, (x_BTD.shape[1], *encoder_output.mask_BS.shape))
        x_BTD, all_kept = self._attending(x_BTD, None, mask_TBS, encoder_output.source, Kept(states, kept.fed_BD))
        return x_BTD, cells.after(all_kept, count_B)

    def _layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{i}") for i in range(self.config.layers)]

    def _zeros(self, rows: int) -> tuple[State, ...]:
        return tuple(cells.zeros(self.cell, rows, self.config.width) for _ in range(self.config.layers))

    def _unfed(self, rows: int) -> jax.Array | None:
        """What the first step is fed."""
        keeps = self.crosses and not ATTENTIONS[self.config.attention].before
        return jnp.zeros((rows, self.config.width), jnp.float32) if keeps else None

    def _source(self, memory: CrossKV) -> Source:
        values_BSM = memory.x_BSM.astype(self.dtype)
        return Source(values_BSM, self.attention.key(values_BSM))

    def _first(self, x_BSM: jax.Array, mask_BS: jax.Array) -> tuple[State, ...]:
        """The states before a segment whose source the mask shows."""
        shares_BS = mask_BS / mask_BS.sum(-1, keepdims=True)
        mean_BM = jnp.einsum("bs,bsm->bm", shares_BS.astype(self.dtype), x_BSM.astype(self.dtype))
        parts = jnp.split(jnp.tanh(self.begin(mean_BM)), self.config.layers * CELLS[self.cell].parts, axis=-1)
        return tuple(zip(*[iter(parts)] * CELLS[self.cell].parts, strict=True))

    def _plain(
        self,
        x_BTD: jax.Array,
        begins_TB1: jax.Array | None,
        states: tuple[State, ...],
        deterministic: bool = True,
        keeps: bool = False,
    ) -> tuple[jax.Array, tuple[State, ...]]:
        """Layer after layer: what the head reads, and each layer's states after each step, whole where it `keeps`."""
        drop = partial(self.drop, deterministic=deterministic)
        x_TBD, all_states = x_BTD.swapaxes(0, 1), []
        for layer, state in zip(self._layers(), states, strict=True):
            now = layer(drop(x_TBD.astype(self.dtype)), begins_TB1, state, keeps=keeps)
            x_TBD = now[0]
            all_states.append(now)
        return drop(x_TBD.swapaxes(0, 1).astype(x_BTD.dtype)), tuple(all_states)

    def _attending(
        self,
        x_BTD: jax.Array,
        begins: Begins | None,
        mask_TBS: jax.Array,
        source: Source,
        kept: Kept,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Kept]:
        """Step after step through all layers: what the head reads, and what is kept after each step, time first."""
        c = self.config
        drop = partial(self.drop, deterministic=deterministic)
        layers, inside = self._layers(), self.attention.inside(source)
        x_TBD = drop(x_BTD.swapaxes(0, 1).astype(self.dtype))
        equations, operands, biases = dict(inside.equations), dict(inside.operands), []
        for i, layer in enumerate(layers):
            read = layer.feed if i == 0 else layer.input
            equations |= {f"state_{i}": layer.state.equation(), f"input_{i}": read.equation()}
            operands |= {f"state_{i}": layer.state.kernel, f"input_{i}": read.kernel}
            biases.append((0.0 if i == 0 else layer.outer_bias(), layer.inner_bias()))
        drops = None
        if c.dropout and not deterministic:
            drops = [drop(jnp.ones((*mask_TBS.shape[:2], c.width))) for _ in layers[1:]]
        addends = {"input_0": layers[0].input(x_TBD) + layers[0].outer_bias()}
        step = partial(_attending_step, CELLS[self.cell], inside.read, self.attention.before)
        constants, xs = (inside.constants, biases), (begins, mask_TBS, drops)
        _, given = scan(Loop(step, equations, self.dtype), operands, addends, constants, kept, xs)
        if self.is_mutable_collection("attention"):  # for pictures
            self.sow("attention", "weights_BHTS", given.weights_BS.swapaxes(0, 1)[:, None])
        x_TBD = self.attention.finished(x_TBD, given.kept.states[-1][0], given.read)
        return drop(x_TBD.swapaxes(0, 1).astype(x_BTD.dtype)), given.kept


class Given(NamedTuple):
    """What a step of an attending decoder gives."""

    kept: Kept
    read: jax.Array  # what the attention gives, [B, M] or [B, D]
    weights_BS: jax.Array


def _attending_step(
    cell: cells.Cell, read: Read, before: bool, product: Product, constants: Any, kept: Kept, x: Any
) -> tuple[Kept, Given]:
    of_attention, biases = constants
    begins, mask_BS, drops = x
    states, fed_BD = kept
    if begins is not None:
        begins_B1, firsts = begins
        states = tuple(cells.begun(state, first, begins_B1) for state, first in zip(states, firsts, strict=True))
        fed_BD = None if fed_BD is None else jnp.where(begins_B1, 0.0, fed_BD)
    fed: Any = fed_BD
    if before:
        fed, weights_BS = read(product, of_attention, states[-1][0], mask_BS)
    now: list[State] = []
    for i, state in enumerate(states):
        x_BD = fed if i == 0 else now[-1][0] if drops is None else now[-1][0] * drops[i - 1]
        of_input, of_state = biases[i]
        inputs_BP, states_BP = product(f"input_{i}", x_BD) + of_input, product(f"state_{i}", state[0]) + of_state
        now.append(cell.step(inputs_BP, states_BP, state))
    if before:
        return Kept(tuple(now), None), Given(Kept(tuple(now), None), fed, weights_BS)
    mixed, weights_BS = read(product, of_attention, now[-1][0], mask_BS)
    return Kept(tuple(now), mixed), Given(Kept(tuple(now), mixed), mixed, weights_BS)


class Recurrent(Model):
    """A language model of recurrent layers."""

    kind: ClassVar[str] = "decoder"
    extra_inputs: ClassVar[tuple[str, ...]] = ("segments_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the parts; what the decoder declares is the model's own."""
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
        """What the layers make of tokens, [B, T, D]; arguments as of gptjax.models.gpt.GPT.features."""
        return self.decoder(self.embedder.embed(ids_BT, perturbation_BTD), segments_BT, None, deterministic)

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """What the head reads of tokens that follow those in the cache; as of gptjax.models.gpt.GPT.extend."""
        x_BTD, kept = self.decoder.extend(self.embedder.embed(ids_BT), cache.layers, cache.length_B, count_B)
        return self.embedder.pre_logits(x_BTD), Cache(kept, cache.length_B + count_B)

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> Kept:
        """What `extend` keeps, of no tokens yet; see gptjax.models.init_cache."""
        return self.decoder.init_cache(rows, capacity, ahead, dtype)
