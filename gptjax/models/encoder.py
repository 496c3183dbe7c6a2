"""Encoders in the manner of BERT (arXiv 1810.04805): every token reads the whole text, before it and after it.

Knows nothing of text, losses or devices. Its blocks are those of gptjax.models.transformer.
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
    """Its logits are of the token at each position, which may be masked."""

    kind: ClassVar[str] = "encoder"
    also_reads: ClassVar[tuple[str, ...]] = ("segments_BT", "types_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the parts; what the trunk declares is the model's own."""
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
        """What the trunk makes of tokens, [B, T, D].

        Args:
          ids_BT: token ids, T at most `config.context` where positions are learned.
          segments_BT: the number of each token's text, int32, in runs of equal ones, 0 for padding; each text is read
            as if it were alone. None: a row is one text.
          types_BT: which of `config.types` kinds each token is of, such as a first and a second sentence; None: 0.
          perturbation_BTD: added to the embedded tokens.
          deterministic: False drops out, and needs `rngs={"dropout": key}`.

        Raises:
          ValueError: T is more than the positions there are.
        """
        x_BTD = self.words.embed(ids_BT, perturbation_BTD)
        if self.config.types:
            types_BT = jnp.zeros_like(ids_BT) if types_BT is None else types_BT
            x_BTD += self.types_nD.astype(x_BTD.dtype)[types_BT]
        return self.transformer(x_BTD, segments_BT, None, deterministic)

    def asked(self, x_BTD: jax.Array) -> jax.Array:
        """What the head reads of features, [B, T, D]."""
        if self.config.head_transform:  # BERT's: one more layer before the table
            x_BTD = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(x_BTD)))
        return self.words.asked(x_BTD)
