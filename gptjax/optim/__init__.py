"""Optimizers and schedules by name: optax chains, made from `config.optimizer` and `config.schedule`."""

from gptjax.optim.averaging import answers_elsewhere, eval_params
from gptjax.optim.optimizers import OPTIMIZERS, matrices, optimizer
from gptjax.optim.schedules import SCHEDULES, Schedule, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Schedule",
    "answers_elsewhere",
    "eval_params",
    "matrices",
    "optimizer",
    "schedule",
]
