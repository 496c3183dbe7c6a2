"""Encoder-decoders: source ids and target ids in, logits of the target out. Any encoder goes with any decoder.

Knows nothing of text, losses or devices. The encoder's and the decoder's blocks are those of the other models.
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
    """Every token of a source reads all of its own pair: embedded tokens [B, S, D] -> [B, S, D]."""

    config: Any
    dtype: str

    def setup(self) -> None:
        """Declares the blocks."""
        config = ConfigDict(self.config)
        config.layers = config.encoder_layers
        self.transformer = Transformer(FrozenConfigDict(config), self.dtype, causal=False)
        nn.share_scope(self, self.transformer)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, deterministic: bool = True) -> jax.Array:
        """What the decoder reads."""
        return self.transformer(x_BSD, segments_BS, None, deterministic)


def transformer_decoder(config: Any, dtype: str) -> nn.Module:
    """Blocks that read an encoder's memory between attention and MLP."""
    return Transformer(config, dtype, crosses=True)


# An encoder: (x_BSD, segments_BS, deterministic) -> x_BSM.
ENCODERS: dict[str, Callable[[Any, str], nn.Module]] = {"transformer": TransformerEncoder}
ENCODERS |= {cell: partial(RecurrentEncoder, cell=cell) for cell in CELLS}
# A decoder: as Trunk, (x_BTD, segments_BT, memory, deterministic) -> x_BTD, with `empty`, `hear` and `extend`.
DECODERS: dict[str, Callable[[Any, str], nn.Module]] = {"transformer": transformer_decoder}
DECODERS |= {cell: partial(RecurrentDecoder, cell=cell, crosses=True) for cell in CELLS}


class Seq2Seq(Model):
    """An encoder-decoder: float32 logits_BTV of a target, given its tokens so far and its source."""

    kind: ClassVar[str] = "seq2seq"
    also_reads: ClassVar[tuple[str, ...]] = ("source_BS", "source_segments_BS", "segments_BT", "perturbation_BSD")

    def setup(self) -> None:
        """Declares the parts; source and target share one table of tokens."""
        super().setup()
        c = self.config
        self.encoder, self.decoder = ENCODERS[c.encoder](c, self.dtype), DECODERS[c.decoder](c, self.dtype)

    def encoded(
        self,
        source_BS: jax.Array,
        source_segments_BS: jax.Array,
        perturbation_BSD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> CrossKV:
        """What the encoder makes of the source; arguments and errors as of `features`."""
        x_BSD = self.words.embed(source_BS, perturbation_BSD)
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
        """What the decoder makes of the target, [B, T, D].

        Args:
          ids_BT: the target's ids so far, its first one the border between texts.
          source_BS: the source's ids.
          source_segments_BS: the number of each one's pair, int32, in runs of equal ones, 0 for padding.
          segments_BT: the same of the target; None: a row is the pair 1.
          perturbation_BSD: added to the embedded source.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: S or T is more than the positions there are.
        """
        memory = self.encoded(source_BS, source_segments_BS, perturbation_BSD, deterministic)
        return self.decoder(self.words.embed(ids_BT), segments_BT, memory, deterministic)

    def hear(self, source_BS: jax.Array, source_segments_BS: jax.Array) -> Any:
        """The source as the decoder reads it, to be kept."""
        return self.decoder.hear(self.encoded(source_BS, source_segments_BS))

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """What the head reads, [B, T, D], of tokens that follow those in the cache, which has heard a source.

        Arguments and errors as of gptjax.models.gpt.GPT.extend.
        """
        x_BTD = self.words.embed(ids_BT)
        x_BTD, layers = self.decoder.extend(x_BTD, cache.layers, cache.length_B, count_B, cache.heard)
        return self.words.asked(x_BTD), Cache(layers, cache.length_B + count_B, cache.heard)

    def empty(self, rows: int, capacity: int, ahead: int, dtype: str) -> Any:
        """What `extend` keeps of the target, of no tokens yet; see gptjax.models.empty."""
        return self.decoder.empty(rows, capacity, ahead, dtype)
