"""What a train step of the tiny recipe needs: a batch, and objective, optimizer, mesh and state."""

import numpy as np
from conftest import tiny_config

from gptjax import models, optim, sharding
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state


def batch_of(rows=8, T=16, ragged=True):
    rng = np.random.default_rng(0)
    weights = (rng.random((rows, T)) < np.linspace(0.1, 1, rows)[:, None]) if ragged else np.ones((rows, T))
    ids = rng.integers(0, 257, (rows, T + 1))
    return {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": weights.astype("f")}


def setting(**changes):
    config = configs.with_vocabulary(tiny_config(optimizer_learning_rate=0.01, **changes), 257)
    model, mesh = models.build(config.model), sharding.make_mesh()
    return causal(model), optim.optimizer(config), mesh, init_state(model, optim.optimizer(config), 0)
