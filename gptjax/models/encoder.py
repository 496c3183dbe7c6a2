"""Bidirectional encoders such as BERT (arXiv 1810.04805): every token attends to the whole text.

Independent of text, losses and devices. Its blocks are those of gptjax.models.transformer.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.layers import ACTIVATIONS, NORMS, Linear
from gptjax.models.model import Model
from gptjax.models.transformer import Transformer


class Encoder(Model):
    """A bidirectional Transformer; its logits predict the token at each position, which may be masked."""

    kind: ClassVar[str] = "encoder"
    extra_inputs: ClassVar[tuple[str, ...]] = ("segments_BT", "types_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the submodules; the Transformer shares the model's scope."""
        c = self.config
        super().setup()
        self.transformer = Transformer(c, self.dtype, causal=False)
        nn.share_scope(self, self.transformer)
        if c.types:
            init = nn.initializers.normal(c.init_std)
            self.types_nD = logical_axes.parameter(self, "types", init, (c.types, c.width))
        if c.head_transform:
            self.transform = Linear(c.width, True, c.init_std, self.dtype, c.kernels)
            self.transform_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)

    def features(
        self,
        ids_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        perturbation_BTD: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Output of the last block, [B, T, D].

        Args:
          ids_BT: token ids, T at most `config.context` with learned positions.
          segments_BT: text number of each token, int32, in contiguous runs, 0 for padding; tokens attend only within
            their text, and positions restart in each. None: a row is one text.
          types_BT: token type ids below `config.types`, such as first and second sentence; None: 0.
          perturbation_BTD: added to the embedded tokens.
          deterministic: False applies dropout, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T exceeds the number of learned positions.
        """
        x_BTD = self.embedder.embed(ids_BT, perturbation_BTD)
        if self.config.types:
            types_BT = jnp.zeros_like(ids_BT) if types_BT is None else types_BT
            x_BTD += self.types_nD.astype(x_BTD.dtype)[types_BT]
        return self.transformer(x_BTD, segments_BT, None, deterministic)

    def pre_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states that the unembedding multiplies, [B, T, D], from the output of the last block."""
        if self.config.head_transform:  # BERT's: one more layer before the unembedding
            x_BTD = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(x_BTD)))
        return self.embedder.pre_logits(x_BTD)
