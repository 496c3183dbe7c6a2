"""Distillation during training: adds the logits of a finished run, the teacher, to each batch."""

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

TeacherFn = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def make_teacher_fn(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> TeacherFn:
    """Returns a function `batch -> batch` that adds the teacher's logits [B, T, V]; the identity without a teacher.

    Args:
      config: of the student.
      tokenizer: of the student.
      mesh: of its batches; the teacher's parameters are replicated.

    Raises:
      ConfigError: the teacher has another tokenizer, vocabulary or kind of model.
      CheckpointError: `objective.teacher` is not a run.
    """
    if "distillation" not in dict(objectives.parse_objective(config.train.objective)):
        return lambda batch: batch
    folder = Path(config.objective.teacher).expanduser()
    teacher = run.load(folder)
    if tokenizers.sha256(teacher.tokenizer) != tokenizers.sha256(tokenizer):
        raise ConfigError(f"the teacher {folder} has another tokenizer; train both on the same text and data.tokenizer")
    large, small = teacher.config.model, config.model
    kinds = [models.MODELS[model.arch].kind for model in (large, small)]
    if kinds[0] != kinds[1] or large.vocabulary != small.vocabulary:
        difference = f"a {kinds[0]} of {large.vocabulary} tokens, and this run a {kinds[1]} of {small.vocabulary}"
        raise ConfigError(f"the teacher {folder} is {difference}; they must be the same")
    if large.context < config.data.context:
        raise ConfigError(f"the teacher reads {large.context} tokens, and data.context is {config.data.context}")
    params = jax.device_put(teacher.params, sharding.replicated(mesh))

    def teacher_logits(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        output = models.forward(teacher.model, params, models.select_inputs(teacher.model, batch))
        logits_BTV = models.next_logits(teacher.model, output.x_BTD, output.unembedding_VD)
        return jax.lax.with_sharding_constraint(
            logits_BTV, sharding.batch_shardings(mesh, {TEACHER: logits_BTV})[TEACHER]
        )

    forward = jax.jit(teacher_logits)
    return lambda batch: batch | {TEACHER: forward(params, batch)}
