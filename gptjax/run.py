"""`Run`: a trained model with all that belongs to it, as a notebook and every command but train sees it."""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import models, random
from gptjax.config import DataError
from gptjax.data import tokenizers
from gptjax.data.tokenizers import Tokenizer
from gptjax.decode import generate as decoding
from gptjax.inspect import parameters
from gptjax.training.checkpoints import Checkpoints, shapes_on
from gptjax.workdir import read_config


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained model with all that belongs to it.

    Attributes:
      workdir: its directory.
      config: resolved and locked.
      model: the Linen module; `model.apply({"params": params}, ids_BT)` gives logits.
      params: float32 parameters of a checkpoint, the newest unless another was asked for.
      tokenizer: a tiktoken.Encoding, or a LibraryTokenizer where that library cannot give the same ids.
    """

    workdir: Path
    config: ConfigDict
    model: nn.Module
    params: Any
    tokenizer: Tokenizer

    def logits(self, ids_BT: Any) -> np.ndarray:
        """float32 [B, T, V] for the token after each position.

        Raises:
          DataError: not two dimensions, longer than the context, or ids out of range.
        """
        ids_BT = np.asarray(ids_BT)
        c = self.config.model
        if ids_BT.ndim != 2 or not np.issubdtype(ids_BT.dtype, np.integer):
            raise DataError(f"ids must be whole numbers of shape [B, T], not {ids_BT.dtype} of shape {ids_BT.shape}")
        if ids_BT.shape[1] > c.context:
            raise DataError(f"{ids_BT.shape[1]} tokens are more than the model's context of {c.context}")
        if ids_BT.size and not (0 <= ids_BT.min() and ids_BT.max() < c.vocabulary):
            raise DataError(f"ids must lie in 0 to {c.vocabulary - 1}")
        return np.asarray(self._apply(self.params, ids_BT))

    def generate(
        self,
        prompt: str = "",
        seed: int = 0,
        index: int = 0,
        on_text: Callable[[str], None] = lambda text: None,
        **settings: Any,
    ) -> decoding.Sample:
        """A continuation of the prompt.

        Args:
          prompt: text to go on from; empty for the start of a document.
          seed: decides every draw, together with `index`.
          index: which of several continuations this is.
          on_text: gets each piece of text as it comes.
          **settings: `max_tokens`, `temperature`, `top_k` of gptjax.decode.generate.Settings.

        Raises:
          ConfigError, DataError: settings or a prompt that cannot be.
        """
        key = random.key(seed, "sample", index)
        return decoding.generate(self._speaker, prompt, decoding.Settings(**settings), key, on_text)

    @cached_property
    def _apply(self) -> Any:
        return jax.jit(partial(models.logits, self.model))

    @cached_property
    def _speaker(self) -> decoding.Speaker:
        return decoding.speaker(self.model, self.params, self.tokenizer, self.config.model.context)

    def __repr__(self) -> str:
        return f"{self.workdir}\n{parameters.as_text(self.params)}"

    def _repr_html_(self) -> str:
        return parameters.as_html(self.params, str(self.workdir))


def load(workdir: str | Path, step: int | str | None = None) -> Run:
    """The run in a directory.

    Args:
      workdir: the directory.
      step: of the checkpoint; "best": the one with the least held-out loss; None: the newest.

    Raises:
      CheckpointError: no run, no such checkpoint, or none that is not damaged.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer")
    model = models.build(config.model, config.train.dtype)
    shapes = models.shapes(model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = Checkpoints(workdir).restore_params(shapes_on(shapes, here), step)
    return Run(workdir, config, model, params, tokenizer)
