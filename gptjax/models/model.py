"""Base class of all models: token embedding, unembedding and task head. Independent of blocks, losses and devices."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
from flax import linen as nn

from gptjax.models.embedder import Embedder
from gptjax.models.heads import TaskHead
from gptjax.models.kernels.reference import unembed

Interceptor = Callable[..., Any]  # (method, args, kwargs, nn.module.InterceptorContext) -> the method's result


class Model(nn.Module):
    """Maps token ids to float32 logits, to hidden states and an unembedding, or to the output of a task head.

    Subclasses define `features`, `kind`, and `extra_inputs`: the names of the inputs of `features` besides ids.

    Attributes:
      config: `config.model` of a run, see gptjax.models.options.
      dtype: of the arithmetic, by name; statistics of norms, softmax, states and logits are always float32.
      attached: an interceptor of its modules' methods (`nn.intercept_methods`), active wherever it is applied.
    """

    config: Any
    dtype: str = "float32"
    attached: Interceptor | None = None

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `nn.Module.apply`, with the interceptor `attached`."""
        with nn.intercept_methods(self.attached) if self.attached else nullcontext():
            return super().apply(*args, **kwargs)

    def setup(self) -> None:
        """Declares the embedder, which shares the model's scope, and the task head."""
        self.embedder = Embedder(self.config, self.dtype)
        nn.share_scope(self, self.embedder)
        if self.config.task != "none":
            self.task = TaskHead(self.config, self.dtype)

    def __call__(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """Logits at each position, float32 [B, T, V]; arguments and errors are those of `features`."""
        return unembed(self.hidden(ids_BT, *others, **more), self.unembedding(), self.config.logit_softcap)

    def features(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """Output of the last layer, [B, T, D]."""
        raise NotImplementedError

    def pre_logits(self, features_BTD: jax.Array) -> jax.Array:
        """Hidden states that the unembedding multiplies, [B, T, D], from the output of the last layer."""
        return self.embedder.pre_logits(features_BTD)

    def hidden(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """Hidden states that the unembedding multiplies, [B, T, D]; arguments and errors are those of `features`."""
        return self.pre_logits(self.features(ids_BT, *others, **more))

    def unembedding(self) -> jax.Array:
        """The unembedding matrix, one row per token, [V, D]."""
        return self.embedder.unembedding()
