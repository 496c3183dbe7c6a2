"""The GPT decoder: token ids in, logits out. One file for the whole family; a config says which member.

Knows nothing of text, losses or devices. Its blocks are those of gptjax.models.transformer.
"""

from typing import Any, ClassVar

import jax
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax.models.cache import Cache
from gptjax.models.model import Model
from gptjax.models.positions import POSITIONS
from gptjax.models.transformer import Transformer


def one_block(config: Any) -> Any:
    """The config of a trunk of a single block on what another trunk made, which knows where its tokens stand."""
    config = ConfigDict(config)
    adds = POSITIONS[config.positions].add is not None
    config.update(layers=1, scan_layers=False, embedding_norm=False, positions="none" if adds else config.positions)
    return FrozenConfigDict(config)


class GPT(Model):
    """A decoder-only Transformer, each token reading those before it."""

    kind: ClassVar[str] = "decoder"
    also_reads: ClassVar[tuple[str, ...]] = ("segments_BT", "bidirectional_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the parts; what the trunk declares is the model's own."""
        super().setup()
        self.transformer = Transformer(self.config, self.dtype)
        nn.share_scope(self, self.transformer)
        for i in range(self.config.mtp_depth):
            setattr(self, f"ahead_{i}", Transformer(one_block(self.config), self.dtype))

    def features(
        self,
        ids_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        bidirectional_BT: jax.Array | None = None,
        perturbation_BTD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """What the trunk makes of tokens, [B, T, D].

        Args:
          ids_BT: token ids, T at most `config.context` where positions are learned.
          segments_BT: the number of each token's document, int32, in runs of equal ones, 0 for padding; each document
            is read as if it were alone. None: a row is one document.
          bidirectional_BT: 1 for tokens that are read from before, too; None: causal throughout.
          perturbation_BTD: added to the embedded tokens.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T is more than the positions there are.
        """
        x_BTD = self.words.embed(ids_BT, perturbation_BTD)
        return self.transformer(x_BTD, segments_BT, None, deterministic, bidirectional_BT)

    def ahead(
        self, features_BTD: jax.Array, segments_BT: jax.Array | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """What the heads of the token after the next one, of that after it, ... read (arXiv 2404.19737 section 2)."""
        heads = [getattr(self, f"ahead_{i}") for i in range(self.config.mtp_depth)]
        return tuple(self.words.asked(head(features_BTD, segments_BT, None, deterministic)) for head in heads)

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """What the head reads, [B, T, D], of tokens that follow those in the cache, and the cache with them.

        Args:
          ids_BT: token ids, at most as many as the cache's `ahead`.
          cache: of this model, as gptjax.models.empty makes it; its rows may have different lengths.
          count_B: how many ids of each row are real, at least 1; what it gives for the others means nothing.

        Raises:
          ValueError: layers are scanned; see gptjax.models.unrolled.
        """
        x_BTD, layers = self.transformer.extend(self.words.embed(ids_BT), cache.layers, cache.length_B, count_B)
        return self.words.asked(x_BTD), Cache(layers, cache.length_B + count_B)

    def empty(self, rows: int, capacity: int, ahead: int, dtype: str) -> Any:
        """What `extend` keeps, of no tokens yet; see gptjax.models.empty."""
        return self.transformer.empty(rows, capacity, ahead, dtype)
