"""Optimizers and schedules by name: optax chains, made from `config.optimizer` and `config.schedule`."""

from gptjax.optim.optimizers import OPTIMIZERS, answering, answers_elsewhere, matrices, optimizer
from gptjax.optim.schedules import SCHEDULES, Schedule, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Schedule",
    "answering",
    "answers_elsewhere",
    "matrices",
    "optimizer",
    "schedule",
]
