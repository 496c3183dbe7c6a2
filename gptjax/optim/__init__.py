"""Optimizers and schedules by name: optax chains built from `config.optimizer` and `config.schedule`."""

from gptjax.optim.averaging import eval_params, has_eval_params
from gptjax.optim.optimizer import weight_decay_mask
from gptjax.optim.optimizers import OPTIMIZERS, optimizer
from gptjax.optim.schedules import SCHEDULES, Schedule, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Schedule",
    "eval_params",
    "has_eval_params",
    "optimizer",
    "schedule",
    "weight_decay_mask",
]
