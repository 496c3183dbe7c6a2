"""The train state and its initialization. It has no data position, since a batch is a function of the step."""

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
from gptjax.finetune.quantization import dequantize, quantize
from gptjax.optim import skip_step as guards
from gptjax.optim.skip_step import Guard


class TrainState(flax.struct.PyTreeNode):
    """The state that a train step reads and changes.

    Attributes:
      step: number of steps taken, int32.
      params: the trained parameters, float32.
      opt_state: state of the optimizer.
      guard: statistics that detect bad steps.
      frozen: the other parameters of the model, in the format of `finetune.quantise`; empty except in fine-tuning.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    guard: Guard
    frozen: Any = flax.struct.field(default_factory=dict)

    def eval_params(self) -> Any:
        """Returns all parameters for evaluation, sampling and loading."""
        return union(dequantize(self.frozen), optim.eval_params(self.opt_state, self.params))

    def eval_shapes(self) -> Any:
        """Returns the shapes of `eval_params`, of a state or of its shapes."""
        return jax.eval_shape(TrainState.eval_params, self)


def init_state(model: nn.Module, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Initializes the state with random parameters. Pure: works under `jax.eval_shape` and `jax.jit`."""
    return init_from_params(models.init(model, rng.key(seed, "init")), optimizer)


def init_from_base(
    base: Any, model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
    """Initializes the state of a run of this config from the parameters of a base. Pure.

    Raises:
      ConfigError: see gptjax.finetune.methods.partition and gptjax.finetune.quantization.quantize.
    """
    fresh = models.init(model, rng.key(config.seed, "init"))
    tuned, frozen = partition(base, config, rng.key(config.seed, "finetune"), fresh)
    return init_from_params(tuned, optimizer, quantize(frozen, config.finetune.quantise))


def init_from_params(params: Any, optimizer: optax.GradientTransformation, frozen: Any = None) -> TrainState:
    """Initializes the state with these trained parameters, and frozen ones."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guards.init_guard(), frozen or {})


def parameter_count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
