"""Distillation: a student is trained on the distribution that a teacher predicts (arXiv 1503.02531)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.objectives import tokens
from gptjax.objectives.objective import Loss

TEACHER = "teacher_BTV"  # key in a batch of the teacher's logits, float32


def distillation(model: nn.Module, options: Any) -> Loss:
    """Builds the loss of a student: teacher_share * divergence from its teacher + (1 - teacher_share) * cross-entropy.

    The loss of a batch without the teacher's logits, such as a held-out one, is the cross-entropy alone.

    Args:
      model: the student.
      options: `config.objective`, of which teacher_temperature and teacher_share are read, and those that
        gptjax.objectives.tokens.token_prediction reads.

    Returns:
      `(params, batch, rng) -> (loss, metrics)`: "loss" is the cross-entropy in nats, "divergence" the teacher's term.
    """

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, weights_BT = (
            models.forward(model, params, models.select_inputs(model, batch), dropout=rng),
            batch["weights_BT"],
        )
        text_loss, metrics = tokens.loss_and_metrics(model, options, output, batch["targets_BT"], weights_BT)
        if TEACHER not in batch:
            return text_loss, metrics
        student_BTV = models.next_logits(model, output.x_BTD, output.unembedding_VD)
        kl = divergence(student_BTV, batch[TEACHER], weights_BT, options.teacher_temperature)
        share = options.teacher_share
        return share * kl + (1 - share) * text_loss, metrics | {"divergence": kl}

    return loss


def divergence(student_BTV: Any, teacher_BTV: Any, weights_BT: Any, temperature: float) -> jax.Array:
    """Computes the sum of weight * KL(teacher || student) of softmax(logits / temperature), times temperature^2, which
    keeps the gradient's scale (arXiv 1503.02531 section 2)."""
    log_q, log_p = (jax.nn.log_softmax(logits / temperature) for logits in (student_BTV, teacher_BTV))
    return temperature**2 * jnp.sum((jnp.exp(log_p) * (log_p - log_q)).sum(-1) * weights_BT)
