"""The whole state of training, and how it begins. Data position is not in it: a batch is a function of the step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from gptjax import models, random
from gptjax.training import guard as guards
from gptjax.training.guard import Guard


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and changes.

    Attributes:
      step: steps taken, int32.
      params: the model's parameters, float32.
      opt_state: the optimizer's own.
      guard: what tells bad steps from others.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    guard: Guard


def initial(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state at step 0. Pure: `jax.eval_shape` gives its shapes and `jax.jit` places it."""
    return starting_with(models.init(model, random.key(seed, "init")), optimizer)


def starting_with(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0 with these parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guards.fresh())


def parameter_count(params: Any) -> int:
    """Numbers in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
