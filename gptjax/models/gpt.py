"""The GPT decoder: token ids in, logits out. A config selects the member of the family.

Independent of text, losses and devices. Its blocks are those of gptjax.models.transformer.
"""

from typing import Any, ClassVar

import jax
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax.models.cache import Cache
from gptjax.models.model import Model
from gptjax.models.positions import POSITIONS
from gptjax.models.transformer import Transformer


def single_block(config: Any) -> Any:
    """The config of a Transformer of one block on the output of another one, which added the positions."""
    config = ConfigDict(config)
    adds = POSITIONS[config.positions].add is not None
    config.update(layers=1, scan_layers=False, embedding_norm=False, positions="none" if adds else config.positions)
    return FrozenConfigDict(config)


class GPT(Model):
    """A decoder-only Transformer with causal attention."""

    kind: ClassVar[str] = "decoder"
    extra_inputs: ClassVar[tuple[str, ...]] = ("segments_BT", "bidirectional_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the submodules; the Transformer shares the model's scope."""
        super().setup()
        self.transformer = Transformer(self.config, self.dtype)
        nn.share_scope(self, self.transformer)
        for i in range(self.config.mtp_depth):
            setattr(self, f"ahead_{i}", Transformer(single_block(self.config), self.dtype))

    def features(
        self,
        ids_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        bidirectional_BT: jax.Array | None = None,
        perturbation_BTD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Output of the last block, [B, T, D].

        Args:
          ids_BT: token ids, T at most `config.context` with learned positions.
          segments_BT: document number of each token, int32, in contiguous runs, 0 for padding; tokens attend only
            within their document, and positions restart in each. None: a row is one document.
          bidirectional_BT: 1 for tokens that earlier tokens attend to as well; None: causal throughout.
          perturbation_BTD: added to the embedded tokens.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T exceeds the number of learned positions.
        """
        x_BTD = self.embedder.embed(ids_BT, perturbation_BTD)
        return self.transformer(x_BTD, segments_BT, None, deterministic, bidirectional_BT)

    def mtp_hidden(
        self, features_BTD: jax.Array, segments_BT: jax.Array | None = None, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """Hidden states of the multi-token prediction heads, nearest token first (arXiv 2404.19737 section 2)."""
        heads = [getattr(self, f"ahead_{i}") for i in range(self.config.mtp_depth)]
        return tuple(self.embedder.pre_logits(head(features_BTD, segments_BT, None, deterministic)) for head in heads)

    def extend(self, ids_BT: jax.Array, cache: Cache, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        """Runs the model on tokens that follow those in the cache.

        Args:
          ids_BT: token ids, at most as many as the cache's `ahead`.
          cache: of this model, from gptjax.models.init_cache; its rows may have different lengths.
          count_B: the number of valid ids of each row, at least 1; the output for the others is undefined.

        Returns:
          Hidden states that the unembedding multiplies, [B, T, D], and the extended cache.

        Raises:
          ValueError: layers are scanned; see gptjax.models.unroll_layers.
        """
        x_BTD, layers = self.transformer.extend(self.embedder.embed(ids_BT), cache.layers, cache.length_B, count_B)
        return self.embedder.pre_logits(x_BTD), Cache(layers, cache.length_B + count_B)

    def init_cache(self, rows: int, capacity: int, ahead: int, dtype: str) -> Any:
        """An empty cache; see gptjax.models.init_cache."""
        return self.transformer.init_cache(rows, capacity, ahead, dtype)
