"""The whole state of training, and how it begins. Data position is not in it: a batch is a function of the step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import models, optim
from gptjax.core import rng
from gptjax.finetune.methods import partition
from gptjax.finetune.paths import union
from gptjax.finetune.quantised import dequantised, quantised
from gptjax.optim import skip_step as guards
from gptjax.optim.skip_step import Guard


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and changes.

    Attributes:
      step: steps taken, int32.
      params: the model's parameters that train, float32.
      opt_state: the optimizer's own.
      guard: what tells bad steps from others.
      frozen: the model's other parameters, which no step changes, as `finetune.quantise` keeps them; in fine-tuning
        alone there are any.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    guard: Guard
    frozen: Any = flax.struct.field(default_factory=dict)

    def eval_params(self) -> Any:
        """All parameters, as evaluation, samples and whoever loads the run read them."""
        return union(dequantised(self.frozen), optim.eval_params(self.opt_state, self.params))

    def eval_shapes(self) -> Any:
        """The shapes of these; of a state, or of its shapes."""
        return jax.eval_shape(TrainState.eval_params, self)


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state at step 0 with random parameters. Pure: `jax.eval_shape` gives its shapes and `jax.jit` places it."""
    return init_from_params(models.init(model, rng.key(seed, "init")), optimizer)


def init_from_base(
    base: Any, model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """The state at step 0 of a run of this config that begins with a base's parameters; pure, too.

    Raises:
      ConfigError: as of gptjax.finetune.methods.partition and gptjax.finetune.quantised.quantised.
    """
    fresh = models.init(model, rng.key(config.seed, "init"))
    tuned, frozen = partition(base, config, rng.key(config.seed, "finetune"), fresh)
    return init_from_params(tuned, optimizer, quantised(frozen, config.finetune.quantise))


def init_from_params(params: Any, optimizer: optax.GradientTransformation, frozen: Any = None) -> TrainState:
    """The state at step 0 with these parameters, beside those that no step changes."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guards.fresh(), frozen or {})


def parameter_count(params: Any) -> int:
    """Numbers in the tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
