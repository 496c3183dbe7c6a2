"""Encoders in the manner of BERT (arXiv 1810.04805): every token reads the whole text, before it and after it.

Knows nothing of text, losses or devices. Its blocks are those of gptjax.models.trunk.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import axes
from gptjax.models.heads import TaskHead
from gptjax.models.kernels.plain import unembed
from gptjax.models.layers import ACTIVATIONS, NORMS, Linear
from gptjax.models.trunk import Trunk
from gptjax.models.words import Words


class Encoder(nn.Module):
    """ids_BT -> float32 logits_BTV of the token at each position, which may be masked; or answers by its task head.

    Attributes:
      config: `config.model` of a run; configs/base.py gives each key's meaning.
      dtype: of the arithmetic, by name; norms' statistics, softmax and logits are float32 whatever it is.
    """

    config: Any
    dtype: str = "float32"

    kind: ClassVar[str] = "encoder"
    also_reads: ClassVar[tuple[str, ...]] = ("segments_BT", "types_BT", "perturbation_BTD")

    def setup(self) -> None:
        """Declares the parts; what words and trunk declare is the model's own."""
        c = self.config
        self.words, self.trunk = Words(c, self.dtype), Trunk(c, self.dtype, causal=False)
        nn.share_scope(self, self.words)
        nn.share_scope(self, self.trunk)
        if c.types:
            init = nn.initializers.normal(c.init_std)
            self.types_nD = axes.parameter(self, "types", init, (c.types, c.width))
        if c.head_transform:
            self.transform = Linear(c.width, True, c.init_std, self.dtype, c.kernels)
            self.transform_norm = NORMS[c.norm](c.use_bias, c.norm_epsilon, c.kernels)
        if c.task != "none":
            self.task = TaskHead(c, self.dtype)

    def __call__(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """Logits for the token at each position, float32 [B, T, V]; arguments and errors as of `read`."""
        return unembed(self.read(ids_BT, *others, **more), self.table(), self.config.logit_softcap)

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
        return self.trunk(x_BTD, segments_BT, None, deterministic)

    def read(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """What the head reads, [B, T, D]; arguments and errors as of `features`."""
        return self.asked(self.features(ids_BT, *others, **more))

    def asked(self, x_BTD: jax.Array) -> jax.Array:
        """What the head reads of features, [B, T, D]."""
        if self.config.head_transform:  # BERT's: one more layer before the table
            x_BTD = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(x_BTD)))
        return self.words.asked(x_BTD)

    def table(self) -> jax.Array:
        """The head's rows, one a token, [V, D]."""
        return self.words.table()
