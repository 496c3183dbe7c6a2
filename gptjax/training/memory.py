"""Memory that a train step needs, compared with the available memory before anything is compiled.

`lower_bound` needs only the config and takes microseconds for any size; `from_state` needs the shapes of the state.
Both leave out most activations, so a config that they refuse cannot work.
"""

import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from gptjax import sharding
from gptjax.config.errors import ConfigError
from gptjax.core import machine
from gptjax.core.machine import gib, tree_bytes
from gptjax.models.options import is_recurrent
from gptjax.optim import OPTIMIZERS

NUMBER = 4  # bytes of a float32 or of a token id


class MemoryNeed(NamedTuple):
    """Memory of one kind.

    Attributes:
      what: its purpose.
      bytes: on all devices together.
      keys: config keys that make it smaller.
    """

    what: str
    bytes: int
    keys: str


def lower_bound(config: ConfigDict) -> list[MemoryNeed]:
    """Lower bound of the memory of a run: parameters, gradients, optimizer state and batches.

    Args:
      config: resolved; a vocabulary that is not known yet counts as 0.
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
        copies = 2 + OPTIMIZERS[config.optimizer.name].moments + (config.optimizer.ema > 0)
    learned = m.positions == "learned" and not is_recurrent(m)
    needs = [
        MemoryNeed("embeddings", copies * NUMBER * (m.vocabulary or 0) * m.width, "model.vocabulary or model.width"),
        MemoryNeed("positions", copies * NUMBER * m.context * m.width * learned, "model.context or model.width"),
        MemoryNeed(
            "blocks", copies * NUMBER * layers * block, "model.width, model.layers, model.mlp_width or model.experts"
        ),
    ]
    return [*needs, *batch_needs(config)]


def batch_needs(config: ConfigDict) -> list[MemoryNeed]:
    """Memory of batches, and of the block inputs that the backward pass of one microbatch keeps at least."""
    shapes = [(size, context) for _, size, context in config.data.stages]
    tokens = max(size * context for size, context in (*shapes, (config.data.batch_size, config.data.context)))
    ahead = 1 + min(config.data.prefetch, config.train.steps - 1)
    item = 2 if config.train.dtype == "bfloat16" else 4
    # An encoder-decoder may get shorter rows.
    arrays, is_full = (
        (1, False) if config.model.arch == "seq2seq" else (3, not is_recurrent(config.model))
    )  # short rows
    activations = tokens // config.train.grad_accumulation * config.model.width * config.model.layers * item
    return [
        MemoryNeed("batches", arrays * NUMBER * tokens * ahead, "data.batch_size, data.context or data.prefetch"),
        MemoryNeed("activations", activations * is_full, "data.batch_size or data.context"),
    ]


def from_state(config: ConfigDict, state: Any) -> list[MemoryNeed]:
    """Memory of a run with the exact sizes of parameters and optimizer state.

    Args:
      config: resolved, with its vocabulary.
      state: shapes of the gptjax.runs.train_state.TrainState.
    """
    trained, frozen = tree_bytes(state.params), tree_bytes(state.frozen)
    keys = "model.width, model.layers or model.vocabulary"
    return [
        MemoryNeed("parameters", trained + frozen, keys),
        MemoryNeed("gradients", trained, keys),
        MemoryNeed("optimizer", tree_bytes(state.opt_state), f"{keys}, or take another optimizer.name"),
        *batch_needs(config),
    ]


def is_close(needs: list[MemoryNeed], devices: int, members: int = 1) -> bool:
    """Returns True if they take more than a third of the available memory."""
    available = machine.device_memory()
    return available is not None and 3 * members * sum(need.bytes for need in needs) > available.bytes * devices


def check(needs: list[MemoryNeed], devices: int, members: int = 1) -> None:
    """Raises ConfigError if a step needs more memory than there is.

    Args:
      needs: of a run.
      devices: number of devices in the mesh, which share the memory evenly at best.
      members: number of runs that are trained at once.
    """
    available = machine.device_memory()
    total = members * sum(need.bytes for need in needs)
    if available is None or total <= available.bytes * devices:
        return
    largest = max(needs, key=lambda need: need.bytes)
    several = f" of {members:,} members" if members > 1 else ""
    each = f" on each of {devices:,} devices" if devices > 1 else ""
    raise ConfigError(
        f"a step{several} needs about {gib(total / devices)}{each}, and {available.owner} has {gib(available.bytes)}: "
        f"{gib(members * largest.bytes / devices)} are for {largest.what}; make {largest.keys} smaller"
    )


def check_config(config: ConfigDict, members: int = 1) -> None:
    """Raises ConfigError if a run of a resolved config needs more memory than there is."""
    check(lower_bound(config), device_count(config, members), members)


def device_count(config: ConfigDict, members: int = 1) -> int:
    """Number of devices that share the memory of a run, or of several runs that are trained at once."""
    return (
        jax.device_count() if members > 1 else math.prod(sharding.mesh_sizes(config.mesh, jax.device_count()).values())
    )
