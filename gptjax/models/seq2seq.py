"""Encoder-decoders: source ids and target ids in, logits of the target out. Encoder and decoder combine freely.

Independent of text, losses and devices. The encoder's and the decoder's blocks are those of the other models.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax.models.attention import CrossKV
from gptjax.models.cache import Cache
from gptjax.models.model import Model
from gptjax.models.recurrent.cells import CELLS
from gptjax.models.recurrent.model import RecurrentDecoder, RecurrentEncoder
from gptjax.models.transformer import Transformer


class TransformerEncoder(nn.Module):
    """Bidirectional encoder of embedded source tokens: [B, S, D] -> [B, S, D]."""

    config: Any
    dtype: str

    def setup(self) -> None:
        """Declares the blocks."""
        config = ConfigDict(self.config)
        config.layers = config.encoder_layers
        self.transformer = Transformer(FrozenConfigDict(config), self.dtype, causal=False)
        nn.share_scope(self, self.transformer)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, deterministic: bool = True) -> jax.Array:
        """The encoder output, [B, S, D]."""
        return self.transformer(x_BSD, segments_BS, None, deterministic)


def transformer_decoder(config: Any, dtype: str) -> nn.Module:
    """A Transformer with cross-attention between self-attention and MLP."""
    return Transformer(config, dtype, crosses=True)


# An encoder: (x_BSD, segments_BS, deterministic) -> x_BSM.
ENCODERS: dict[str, Callable[[Any, str], nn.Module]] = {"transformer": TransformerEncoder}
ENCODERS |= {cell: partial(RecurrentEncoder, cell=cell) for cell in CELLS}
# A decoder: (x_BTD, segments_BT, memory, deterministic) -> x_BTD, with `init_cache`, `project_memory` and `extend`.
DECODERS: dict[str, Callable[[Any, str], nn.Module]] = {"transformer": transformer_decoder}
DECODERS |= {cell: partial(RecurrentDecoder, cell=cell, crosses=True) for cell in CELLS}


class Seq2Seq(Model):
    """An encoder-decoder: float32 logits_BTV of a target, given its preceding tokens and a source."""

    kind: ClassVar[str] = "seq2seq"
    extra_inputs: ClassVar[tuple[str, ...]] = ("source_BS", "source_segments_BS", "segments_BT", "perturbation_BSD")

    def setup(self) -> None:
        """Declares the submodules; source and target share the token embedding."""
        super().setup()
        c = self.config
        self.encoder, self.decoder = ENCODERS[c.encoder](c, self.dtype), DECODERS[c.decoder](c, self.dtype)

    def encode(
        self,
        source_BS: jax.Array,
        source_segments_BS: jax.Array,
        perturbation_BSD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> CrossKV:
        """Encodes a source; arguments and errors are those of `features`."""
        x_BSD = self.embedder.embed(source_BS, perturbation_BSD)
        return CrossKV(self.encoder(x_BSD, source_segments_BS, deterministic), source_segments_BS)

    def features(
        self,
        ids_BT: jax.Array,
        source_BS: jax.Array,
        source_segments_BS: jax.Array,
        segments_BT: jax.Array | None = None,
        perturbation_BSD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Output of the decoder's last layer, [B, T, D].

        Args:
          ids_BT: the target's ids, shifted right; the first one is the start token.
          source_BS: the source's ids.
          source_segments_BS: pair number of each source token, int32, in contiguous runs, 0 for padding.
          segments_BT: pair number of each target token; None: a row is pair 1.
          perturbation_BSD: added to the embedded source.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: S or T exceeds the number of learned positions.
        """
        memory = self.encode(source_BS, source_segments_BS, perturbation_BSD, deterministic)
        return self.decoder(self.embedder.embed(ids_BT), segments_BT, memory, deterministic)

    def encode_source(self, source_BS: jax.Array, source_segments_BS: jax.Array) -> Any:
        """Encodes a source and projects the encoder output for the decoder's cache."""
        return self.decoder.project_memory(self.encode(source_BS, source_segments_BS))

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """Runs the decoder on tokens that follow those in the cache, which holds an encoder output.

        Arguments, results and errors are those of gptjax.models.gpt.GPT.extend.
        """
        x_BTD = self.embedder.embed(ids_BT)
        x_BTD, layers = self.decoder.extend(x_BTD, cache.layers, cache.length_B, count_B, cache.encoder_output)
        return self.embedder.pre_logits(x_BTD), Cache(layers, cache.length_B + count_B, cache.encoder_output)

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> Any:
        """An empty cache of the target; see gptjax.models.init_cache."""
        return self.decoder.init_cache(rows, capacity, ahead, dtype)
