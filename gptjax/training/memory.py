"""Memory that a train step needs, compared with what there is before anything is compiled.

`least` follows from the config alone, in microseconds whatever its sizes are; `exact` from the shapes of the state.
Both leave out most activations, so that what they refuse cannot work.
"""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from gptjax import sharding
from gptjax.config.checks import is_recurrent
from gptjax.config.errors import ConfigError
from gptjax.core import machine
from gptjax.core.machine import gib, tree_bytes

MOMENTS = {"adamw": 2, "lion": 1, "sophia": 2, "muon": 1, "schedule_free": 2}  # of the optimizer, a float32 each
NUMBER = 4  # bytes of a float32, and of an id


class Need(NamedTuple):
    """Memory of one kind.

    Attributes:
      what: it is for.
      bytes: on all devices together.
      keys: of the config, which make it smaller.
    """

    what: str
    bytes: int
    keys: str


def least(config: ConfigDict) -> list[Need]:
    """Memory without which a run cannot train: parameters, gradients, the optimizer's state and batches.

    Args:
      config: resolved; where its vocabulary is not known yet, it counts as nothing.
    """
    m = config.model
    layers = m.layers + (m.encoder_layers or 0 if m.arch == "seq2seq" else 0)
    if is_recurrent(m):
        block = m.width * m.width  # a cell has more
    else:
        experts = m.experts if m.mlp == "experts" else 1
        block = 2 * m.width * (m.mlp_width * experts + m.heads * m.head_width)
    copies = 1
    if config.finetune.method == "full" and config.finetune.quantise == "none":
        copies = 2 + MOMENTS.get(config.optimizer.name, 0) + (config.optimizer.ema > 0)
    learned = m.positions == "learned" and not is_recurrent(m)
    found = [
        Need("embeddings", copies * NUMBER * (m.vocabulary or 0) * m.width, "model.vocabulary or model.width"),
        Need("positions", copies * NUMBER * m.context * m.width * learned, "model.context or model.width"),
        Need("blocks", copies * NUMBER * layers * block, "model.width, model.layers, model.mlp_width or model.experts"),
    ]
    return [*found, *of_batches(config)]


def of_batches(config: ConfigDict) -> list[Need]:
    """Memory of batches, and of the least that the backward pass of a slice of one keeps: each block's input."""
    shapes = [(size, context) for _, size, context in config.data.stages]
    tokens = max(size * context for size, context in (*shapes, (config.data.batch_size, config.data.context)))
    ahead = 1 + min(config.data.prefetch, config.train.steps - 1)
    item = 2 if config.train.dtype == "bfloat16" else 4
    arrays, whole = (1, False) if config.model.arch == "seq2seq" else (3, not is_recurrent(config.model))  # short rows
    kept = tokens // config.train.grad_accumulation * config.model.width * config.model.layers * item
    return [
        Need("batches", arrays * NUMBER * tokens * ahead, "data.batch_size, data.context or data.prefetch"),
        Need("activations", kept * whole, "data.batch_size or data.context"),
    ]


def exact(config: ConfigDict, state: Any) -> list[Need]:
    """The same with parameters and the optimizer's state as their shapes are.

    Args:
      config: resolved, with its vocabulary.
      state: shapes of the gptjax.runs.train_state.TrainState.
    """
    trained, kept = tree_bytes(state.params), tree_bytes(state.frozen)
    keys = "model.width, model.layers or model.vocabulary"
    return [
        Need("parameters", trained + kept, keys),
        Need("gradients", trained, keys),
        Need("optimizer", tree_bytes(state.opt_state), f"{keys}, or take another optimizer.name"),
        *of_batches(config),
    ]


def is_close(needs: list[Need], devices: int, members: int = 1) -> bool:
    """Whether they take a third or more of what there is."""
    found = machine.device_memory()
    return found is not None and 3 * members * sum(need.bytes for need in needs) > found.bytes * devices


def check(needs: list[Need], devices: int, members: int = 1) -> None:
    """Raises ConfigError where a step needs more memory than there is.

    Args:
      needs: of a run.
      devices: that its mesh divides it among, at best evenly.
      members: runs that are trained at once.
    """
    found = machine.device_memory()
    total = members * sum(need.bytes for need in needs)
    if found is None or total <= found.bytes * devices:
        return
    most = max(needs, key=lambda need: need.bytes)
    several = f" of {members:,} members" if members > 1 else ""
    each = f" on each of {devices:,} devices" if devices > 1 else ""
    raise ConfigError(
        f"a step{several} needs about {gib(total / devices)}{each}, and {found.owner} has {gib(found.bytes)}: "
        f"{gib(members * most.bytes / devices)} are for {most.what}; make {most.keys} smaller"
    )


def check_config(config: ConfigDict, members: int = 1) -> None:
    """Raises ConfigError where a run of a resolved config needs more memory than there is."""
    check(least(config), devices_of(config, members), members)


def devices_of(config: ConfigDict, members: int = 1) -> int:
    """How many devices a run is divided among, or several that are trained at once."""
    return jax.device_count() if members > 1 else math.prod(sharding.sizes(config.mesh, jax.device_count()).values())
