"""Coordinate check of a parametrization (arXiv 2203.03466, appendix D.1): the change of activations in the first steps,
by the model's width. With a correct parametrization it does not depend on the width; otherwise it grows or vanishes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import models, objectives, optim, sharding
from gptjax.core import rng
from gptjax.interpret import sites
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state
from gptjax.training.step import train_step

LOGITS = sites.LOGITS
SUBLAYERS = r"block_\d+/(attention|mlp)"


def activations(model: nn.Module, params: Any, ids_BT: jax.Array) -> dict[str, np.ndarray]:
    """Outputs of each attention and MLP, [B, T, D], by path, and the logits."""
    result = sites.forward(model, params, ids_BT, SUBLAYERS)
    return {name: np.asarray(x) for name, x in {LOGITS: result.logits_BTV, **result.activations}.items()}


def activation_changes(config: ConfigDict, batch: Mapping[str, Any], steps: int) -> dict[str, list[float]]:
    """Root mean square change of activations since initialization, by path, after each training step.

    Args:
      config: resolved, with a vocabulary; of a decoder or an encoder.
      batch: the batch of each step, on which activations are measured too.
      steps: the number of steps.
    """
    model, optimizer, mesh = models.build(config.model), optim.optimizer(config), sharding.make_mesh(data=1)
    step = jax.jit(train_step(objectives.loss(config, model), optimizer, mesh, config.seed))
    state = jax.jit(lambda: init_state(model, optimizer, config.seed))()
    before = activations(model, state.params, batch["inputs_BT"])
    changes: dict[str, list[float]] = {name: [] for name in before}
    for _ in range(steps):
        state, _ = step(state, dict(batch))
        for name, now in activations(model, state.params, batch["inputs_BT"]).items():
            changes[name].append(float(np.sqrt(np.mean((now - before[name]) ** 2))))
    return changes


def over_widths(config: ConfigDict, widths: Sequence[int], steps: int = 4, rows: int = 4) -> dict[str, np.ndarray]:
    """Runs `activation_changes` at several widths on random ids: arrays [width, step] by path.

    Args:
      config: not resolved; its head_width is kept, and the number of heads grows.
      widths: multiples of the head width.
      steps: the number of training steps.
      rows: B.
    """
    by_width = []
    for width in widths:
        wide = config.copy_and_resolve_references()
        with wide.unlocked():
            model = wide.model
            model.update(width=width, heads=width // model.head_width, vocabulary=model.vocabulary or 256)
        wide = configs.resolve(wide)
        by_width.append(activation_changes(wide, random_batch(wide, rows), steps))
    return {name: np.array([one[name] for one in by_width]) for name in by_width[0]}


def random_batch(config: ConfigDict, rows: int) -> dict[str, np.ndarray]:
    """A batch of random ids to overfit, deterministic by the config's seed."""
    generator = np.random.default_rng(rng.integer(config.seed, "batches"))
    ids = generator.integers(0, config.model.vocabulary, (rows, config.data.context + 1)).astype(np.int32)
    return {
        "inputs_BT": ids[:, :-1],
        "targets_BT": ids[:, 1:],
        "weights_BT": np.ones((rows, config.data.context), np.float32),
    }


def slopes(widths: Sequence[int], changes: Mapping[str, np.ndarray], step: int = -1) -> dict[str, float]:
    """Slope of log(change) over log(width) after a step, by path; 0 if the change does not depend on the width."""
    x = np.log(np.array(widths, float))
    return {name: float(np.polyfit(x, np.log(values[:, step]), 1)[0]) for name, values in changes.items()}
