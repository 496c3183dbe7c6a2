"""A teacher's part in training: a finished run says what it makes of each batch before the student reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import models, objectives, sharding
from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.objectives.distillation import TEACHER
from gptjax.runs import run

Teach = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def teaching(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> Teach:
    """`batch -> batch`: with the teacher's logits [B, T, V], where the objective is to learn from one.

    Args:
      config: of the student's run.
      tokenizer: of that run.
      mesh: where its batches lie; the teacher's parameters lie whole on each device.

    Raises:
      ConfigError: a teacher of another tokenizer, vocabulary or kind.
      CheckpointError: `objective.teacher` is no run.
    """
    if "distillation" not in dict(objectives.parts(config.train.objective)):
        return lambda batch: batch
    folder = Path(config.objective.teacher).expanduser()
    teacher = run.load(folder)
    if tokenizers.sha256(teacher.tokenizer) != tokenizers.sha256(tokenizer):
        raise ConfigError(f"the teacher {folder} has another tokenizer; train both on the same text and data.tokenizer")
    theirs, ours = teacher.config.model, config.model
    kinds = [models.MODELS[model.arch].kind for model in (theirs, ours)]
    if kinds[0] != kinds[1] or theirs.vocabulary != ours.vocabulary:
        what = f"a {kinds[0]} of {theirs.vocabulary} tokens, and this run a {kinds[1]} of {ours.vocabulary}"
        raise ConfigError(f"the teacher {folder} is {what}; a student says what its teacher says")
    if theirs.context < config.data.context:
        raise ConfigError(f"the teacher reads {theirs.context} tokens, and data.context is {config.data.context}")
    params = jax.device_put(teacher.params, sharding.replicated(mesh))

    def said(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        found = models.forward(teacher.model, params, models.select_inputs(teacher.model, batch))
        logits_BTV = models.next_logits(teacher.model, found.x_BTD, found.unembedding_VD)
        return jax.lax.with_sharding_constraint(logits_BTV, sharding.of_batch(mesh, {TEACHER: logits_BTV})[TEACHER])

    teach = jax.jit(said)
    return lambda batch: batch | {TEACHER: teach(params, batch)}
