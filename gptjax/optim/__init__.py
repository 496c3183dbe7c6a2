"""Optimizers and schedules by name: optax chains, made from `config.optimizer` and `config.schedule`."""

from gptjax.optim.averaging import answering, answers_elsewhere
from gptjax.optim.optimizers import OPTIMIZERS, matrices, optimizer
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
