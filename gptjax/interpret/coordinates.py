"""The coordinate check of a parametrisation (arXiv 2203.03466, appendix D.1): how far activations move in the first
steps, by the model's width. Where it is right they move as far at any width; else the largest models move too far, or
not at all."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import models, objectives, optim, sharding
from gptjax.core import rng
from gptjax.interpret import sites
from gptjax.runs.train_state import init_state
from gptjax.training.step import train_step

LOGITS = sites.LOGITS
MOVING = r"block_\d+/(attention|mlp)"  # what adds to the stream


def activations(model: nn.Module, params: Any, ids_BT: jax.Array) -> dict[str, np.ndarray]:
    """What each attention and MLP gives, [B, T, D], by its path, and the logits."""
    seen = sites.forward(model, params, ids_BT, MOVING)
    return {name: np.asarray(x) for name, x in {LOGITS: seen.logits_BTV, **seen.kept}.items()}


def movements(config: ConfigDict, batch: Mapping[str, Any], steps: int) -> dict[str, list[float]]:
    """How far activations are from what they were before the first step, root mean square, after each step.

    Args:
      config: resolved, with a vocabulary; of a decoder or an encoder.
      batch: what each step learns from, and what is looked at.
      steps: to take.
    """
    model, optimizer, mesh = models.build(config.model), optim.optimizer(config), sharding.make_mesh(data=1)
    step = jax.jit(train_step(objectives.loss(config, model), optimizer, mesh, config.seed))
    state = jax.jit(lambda: init_state(model, optimizer, config.seed))()
    before = activations(model, state.params, batch["inputs_BT"])
    found: dict[str, list[float]] = {name: [] for name in before}
    for _ in range(steps):
        state, _ = step(state, dict(batch))
        for name, now in activations(model, state.params, batch["inputs_BT"]).items():
            found[name].append(float(np.sqrt(np.mean((now - before[name]) ** 2))))
    return found


def over_widths(config: ConfigDict, widths: Sequence[int], steps: int = 4, rows: int = 4) -> dict[str, np.ndarray]:
    """`movements` by path, [width, step], of a recipe at several widths, on drawn ids.

    Args:
      config: not resolved; its head_width stays, so that heads are added.
      widths: multiples of it.
    """
    by_width = []
    for width in widths:
        own = config.copy_and_resolve_references()
        with own.unlocked():
            own.model.update(width=width, heads=width // own.model.head_width, vocabulary=own.model.vocabulary or 256)
        own = configs.resolve(own)
        by_width.append(movements(own, drawn_batch(own, rows), steps))
    return {name: np.array([one[name] for one in by_width]) for name in by_width[0]}


def drawn_batch(config: ConfigDict, rows: int) -> dict[str, np.ndarray]:
    """Ids to learn by heart, always the same for a seed."""
    drawn = np.random.default_rng(rng.integer(config.seed, "batches"))
    ids = drawn.integers(0, config.model.vocabulary, (rows, config.data.context + 1)).astype(np.int32)
    return {
        "inputs_BT": ids[:, :-1],
        "targets_BT": ids[:, 1:],
        "weights_BT": np.ones((rows, config.data.context), np.float32),
    }


def slopes(widths: Sequence[int], moved: Mapping[str, np.ndarray], step: int = -1) -> dict[str, float]:
    """By path the slope of log(movement) over log(width) after a step; 0 where the width changes nothing."""
    x = np.log(np.array(widths, float))
    return {name: float(np.polyfit(x, np.log(values[:, step]), 1)[0]) for name, values in moved.items()}
