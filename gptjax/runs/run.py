"""`Run`: a trained model with its config, parameters and tokenizer, for notebooks and every command but train."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import models
from gptjax.config.errors import CheckpointError, DataError
from gptjax.core import rng
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode import fill_mask
from gptjax.decode import generate as decoding
from gptjax.decode.engine import Sample
from gptjax.finetune import methods, prompts
from gptjax.runs import inputs, parameter_table, predictions, pretrained
from gptjax.runs.directory import read_config


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained model with its config, parameters and tokenizer.

    Attributes:
      workdir: its directory.
      config: resolved and locked.
      model: the Linen module; `model.apply({"params": params}, ids_BT)` returns logits.
      params: float32 parameters of a checkpoint.
      tokenizer: a tiktoken.Encoding, or a LibraryTokenizer where tiktoken does not give the same ids; the ids of a
        tuned prompt are in its `begin`, and lie beyond the vocabulary.
    """

    workdir: Path
    config: ConfigDict
    model: nn.Module
    params: Any
    tokenizer: Tokenizer

    def logits(self, *arrays: Any, **by_name: Any) -> np.ndarray:
        """Returns logits, float32 [B, T, V]: of the token after each position; for an encoder, of the token at it.

        Args:
          *arrays: int32 inputs of the model's forward pass. A decoder: ids_BT, optionally segments_BT and
            bidirectional_BT (1: attended to from earlier positions, too). An encoder: ids_BT, optionally segments_BT
            and types_BT. An encoder-decoder: ids_BT of the target, its start first, source_BS, optionally
            source_segments_BS and segments_BT. Segments number the texts of a row, and 0 is padding; without them a row
            is one text.
          **by_name: inputs by these names.

        Raises:
          DataError: not two dimensions, longer than the context, ids out of range, or arrays of different shapes.
        """
        return np.asarray(self._apply(self.params, inputs.check_inputs(self.model, arrays, by_name)))

    def answer(self, *arrays: Any, **by_name: Any) -> np.ndarray:
        """Returns the output of the task head (`config.model.task`), float32; see gptjax.models.heads.

        Arguments and errors are those of `logits`.
        """
        if self.config.model.task == "none":
            raise DataError(f"{self.workdir} has no task head; its config.model.task is none")
        return np.asarray(self._answer(self.params, inputs.check_inputs(self.model, arrays, by_name)))

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns predictions of the task head for records; see gptjax.runs.predictions.predictions."""
        return predictions.predictions(self, records)

    def generate(
        self,
        prompt: str = "",
        seed: int = 0,
        index: int = 0,
        on_text: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> Sample:
        """Generates a continuation of the prompt; of a search, the best.

        Args:
          prompt: text to continue; empty for the start of a document. The source, for an encoder-decoder.
          seed: determines all samples, together with `index`.
          index: number of the continuation among several of a prompt.
          on_text: called with each new part of the text.
          **options: of gptjax.decode.settings.SamplingParams (`max_tokens`, `temperature`, `top_k`, `stop`, ...) and of
            gptjax.decode.generate.GenerationConfig (`sliding_context`, `beams`, `grammar`, ...).

        Raises:
          ConfigError: invalid options.
          DataError: an invalid prompt.
        """
        sampling_params, generation = decoding.split_options(options)
        request = decoding.Request(prompt, sampling_params, rng.key(seed, "sample", index))
        return next(self.generate_batch([request], generation, lambda _, text: on_text(text)))[1]

    def generate_batch(
        self,
        requests: Sequence[decoding.Request],
        generation: decoding.GenerationConfig = decoding.DEFAULT,
        on_text: decoding.OnText = lambda number, text: None,
        stride: int = 0,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields continuations of many prompts as they finish; see gptjax.decode.generate.generate."""
        return decoding.generate(self.generator, requests, generation, on_text, stride)

    def fill(self, text: str, k: int = 5) -> fill_mask.FilledText:
        """Returns the k most likely tokens for each mask of a text; for encoders. See gptjax.decode.fill_mask.fill."""
        return fill_mask.fill(self.model, self.params, self.tokenizer, text, k)

    @cached_property
    def _apply(self) -> Any:
        return jax.jit(lambda params, arrays: models.logits(self.model, params, **arrays))

    @cached_property
    def _answer(self) -> Any:
        return jax.jit(partial(models.task_output, self.model))

    @cached_property
    def generator(self) -> decoding.Generator:
        """The model in the form that gptjax.decode takes."""
        return decoding.generator(self.model, self.params, self.tokenizer, self.config.model.context)

    def __repr__(self) -> str:
        return f"{self.workdir}\n{parameter_table.as_text(self.params)}"

    def _repr_html_(self) -> str:
        return parameter_table.as_html(self.params, str(self.workdir))


def load(workdir: str | Path, step: int | str | None = None) -> Run:
    """Loads a run from its directory.

    Args:
      workdir: the directory.
      step: of the checkpoint; "best": the one with the lowest held-out loss; None: the newest.

    Raises:
      CheckpointError: no run, no such checkpoint, or only damaged ones.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer")
    around = [*tokenizer.begin, *([] if tokenizer.end is None else [tokenizer.end])]
    if tokenizer.n_vocab > config.model.vocabulary or any(not 0 <= one < tokenizer.n_vocab for one in around):
        problem = f"{tokenizer.n_vocab:,} ids, {around} around a text, of the {config.model.vocabulary:,} of the model"
        raise CheckpointError(f"the tokenizer in {workdir} is damaged: it has {problem}")
    with_prompt = prompts.with_prompt(tokenizer, config)
    return Run(workdir, config, methods.build_model(config), pretrained.load_params(workdir, step=step), with_prompt)
