"""What every model does at its two ends, whatever stands between them: its words, its head, its task head.

Knows no blocks, losses or devices.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
from flax import linen as nn

from gptjax.models.embedder import Embedder
from gptjax.models.heads import TaskHead
from gptjax.models.kernels.reference import unembed

Interceptor = Callable[..., Any]  # (method, args, kwargs, nn.module.InterceptorContext) -> what it gives


class Model(nn.Module):
    """ids_BT -> float32 logits_BTV, or what the head reads and the head's table, or answers by a task head.

    A member has a `features` of its own, a `kind` and a tuple `also_reads` of what its `features` reads besides ids.

    Attributes:
      config: `config.model` of a run; configs/base.py gives each key's meaning.
      dtype: of the arithmetic, by name; norms' statistics, softmax, states and logits are float32 whatever it is.
      attached: what else is done with its modules' methods wherever it is applied (`nn.intercept_methods`).
    """

    config: Any
    dtype: str = "float32"
    attached: Interceptor | None = None

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.apply`, with what is attached."""
        with nn.intercept_methods(self.attached) if self.attached else nullcontext():
            return super().apply(*args, **kwargs)

    def setup(self) -> None:
        """Declares the words, whose names are the model's own, and the task head."""
        self.words = Embedder(self.config, self.dtype)
        nn.share_scope(self, self.words)
        if self.config.task != "none":
            self.task = TaskHead(self.config, self.dtype)

    def __call__(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """Logits at each position, float32 [B, T, V]; arguments and errors as of `features`."""
        return unembed(self.read(ids_BT, *others, **more), self.table(), self.config.logit_softcap)

    def features(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """What the layers make of tokens, [B, T, D]."""
        raise NotImplementedError

    def asked(self, features_BTD: jax.Array) -> jax.Array:
        """What the head reads of features, [B, T, D]."""
        return self.words.asked(features_BTD)

    def read(self, ids_BT: jax.Array, *others: Any, **more: Any) -> jax.Array:
        """What the head reads, [B, T, D]; arguments and errors as of `features`."""
        return self.asked(self.features(ids_BT, *others, **more))

    def table(self) -> jax.Array:
        """The head's rows, one a token, [V, D]."""
        return self.words.table()
