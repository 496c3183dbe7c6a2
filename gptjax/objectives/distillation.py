"""Distillation: a student says what a teacher says, likely tokens and unlikely ones (arXiv 1503.02531)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss

TEACHER = "teacher_BTV"  # of a batch: the teacher's logits for it, float32


def distillation(model: nn.Module, options: Any) -> Loss:
    """The loss of a student: a share of the divergence from its teacher, and the rest of the text's own cross-entropy.

    A batch that no teacher has seen, such as a held-out one, has the text's alone.

    Args:
      model: the student.
      options: `config.objective`, of which teacher_temperature and teacher_share are read, and what
        gptjax.objectives.tokens.predicted reads.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: "loss" is the text's own, in nats, "divergence" the teacher's part.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        said, weights_BT = (
            models.forward(model, params, models.select_inputs(model, batch), dropout=rng),
            batch["weights_BT"],
        )
        own, metrics = tokens.of_output(model, options, said, batch["targets_BT"], weights_BT)
        if TEACHER not in batch:
            return own, metrics
        student_BTV = models.next_logits(model, said.x_BTD, said.unembedding_VD)
        apart = divergence(student_BTV, batch[TEACHER], weights_BT, options.teacher_temperature)
        share = options.teacher_share
        return share * apart + (1 - share) * own, metrics | {"divergence": apart}

    return loss


def divergence(student_BTV: Any, teacher_BTV: Any, weights_BT: Any, temperature: float) -> jax.Array:
    """Sum of weight * KL(teacher || student) of softmax(logits / temperature), times temperature^2, which keeps the
    gradient's size (arXiv 1503.02531 section 2)."""
    log_q, log_p = (jax.nn.log_softmax(logits / temperature) for logits in (student_BTV, teacher_BTV))
    return temperature**2 * jnp.sum((jnp.exp(log_p) * (log_p - log_q)).sum(-1) * weights_BT)
