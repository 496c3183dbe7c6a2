"""A small decoder that learns to copy: random tokens, said again and again. What notebook 3 watches; draws nothing.

from experiments.notebooks import repetition   # in the repository's root
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gptjax import models, optim
from gptjax.core import rng
from gptjax.interpret import induction, lens
from gptjax.runs import config as configs


class Look(NamedTuple):
    """What a model is like after so many steps.

    Attributes:
      step: how many.
      first: nats per token where tokens are said for the first time; log(vocabulary) is the best there is.
      again: nats per token where they are said again.
      scores_LH: induction scores of the heads, see gptjax.interpret.induction.
    """

    step: int
    first: float
    again: float
    scores_LH: np.ndarray


def recipe(changes: Sequence[str] = (), vocabulary: int = 64) -> Any:
    """The config of a two-layer decoder, four heads a layer; `changes` as on the command line, --config.KEY=VALUE."""
    keys = {
        "model.layers": 2, "model.heads": 4, "model.width": 64, "model.context": 64, "data.batch_size": 32,
        "model.positions": "rotary", "optimizer.name": "muon", "optimizer.learning_rate": 1e-2,
        "optimizer.weight_decay": 0.0, "schedule.name": "constant", "schedule.warmup_steps": 20,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    config = configs.read("configs/base.py", [*flags, *changes])
    return configs.with_vocabulary(configs.resolve(config), vocabulary)


def periodic(key: jax.Array, rows: int, length: int, vocabulary: int) -> jax.Array:
    """Random tokens said again and again, int32 [B, T]: how many before they are is drawn for each row, T/8 to T/2.

    So that where a copy is cannot be learnt as a distance.
    """
    of_tokens, of_periods = jax.random.split(key)
    ids_BT = jax.random.randint(of_tokens, (rows, length), 0, vocabulary, jnp.int32)
    period_B = jax.random.randint(of_periods, (rows,), max(length // 8, 1), length // 2 + 1)
    return jnp.take_along_axis(ids_BT, jnp.arange(length) % period_B[:, None], axis=1)


def trained(
    config: Any, steps: int, every: int, on_look: Callable[[Look], None] = lambda _: None
) -> tuple[nn.Module, Any, list[Look]]:
    """A model trained on such tokens, its parameters, and how it was on the way.

    Args:
      config: as of `recipe`.
      steps: of training.
      every: steps between two looks.
      on_look: gets each as it comes.
    """
    model, optimizer = models.build(config.model, config.train.dtype), optim.optimizer(config)
    T, V = config.model.context, config.model.vocabulary
    draws, looks = jax.random.split(jax.random.key(config.data.seed or 0))
    params = models.init(model, rng.key(config.seed, "init"))

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        ids_BT = periodic(key, config.data.batch_size, T, V)
        loss = lambda params: lens.nats(models.logits(model, params, ids_BT), ids_BT).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, donate_argnums=0)
    def some_steps(carry: tuple[Any, Any], keys: jax.Array) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, keys)[0]

    ids_BT = induction.repeated_tokens(looks, 16, T // 2, V)
    carry, found = (params, jax.jit(optimizer.init)(params)), []
    for done in range(0, steps + 1, every):
        found.append(looked(done, model, carry[0], ids_BT, looks))
        on_look(found[-1])
        if done < steps:
            carry = some_steps(carry, jax.vmap(lambda i: jax.random.fold_in(draws, i))(done + jnp.arange(every)))
    return model, carry[0], found


def looked(step: int, model: nn.Module, params: Any, ids_BT: jax.Array, key: jax.Array) -> Look:
    """How the model is with tokens that are said twice, [B, T]."""
    nats = np.asarray(lens.token_loss(model, params, ids_BT))
    half = ids_BT.shape[1] // 2
    scores_LH = induction.scores(model, params, key, rows=len(ids_BT), length=half)
    # The first of the copy cannot be known: nothing says yet that it is one.
    return Look(step, float(nats[:, : half - 1].mean()), float(nats[:, half:].mean()), scores_LH)
