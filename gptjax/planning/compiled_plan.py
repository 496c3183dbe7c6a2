"""The real train step of a config on a mesh that is not here: compiled for virtual devices, and read. Nothing is
allocated and nothing is run.

What XLA says of memory is of its CPU compiler: other backends fuse and schedule otherwise. Two things are made as they
will be there: the kernels are the chip's (but for cuDNN's attention, which is no part of a program for CPUs, so that
scores are counted whole), and float16 stands for bfloat16, which has its size and which the CPU compiler would widen
to float32 on the way.
"""

import ctypes
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from gptjax import models, objectives, optim, sharding
from gptjax.config.errors import ConfigError
from gptjax.finetune import methods
from gptjax.models import kernels
from gptjax.planning import collectives, costs, hlo, matmuls, roofline
from gptjax.planning.chips import Chip
from gptjax.planning.collectives import Collective
from gptjax.runs.checkpoints import shapes_on
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.training.monitoring import metrics
from gptjax.training.step import make_train_step


class Memory(NamedTuple):
    """Bytes on one device while a step runs."""

    parameters: int
    optimizer: int
    batch: int
    temporaries: int  # activations and gradients, where they are most

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Program(NamedTuple):
    """A step that can be compiled."""

    config: ConfigDict  # resolved, with the kernels of its chip
    mesh: Mesh
    start: Any  # `() -> TrainState`
    shapes: TrainState
    step: jax.stages.Wrapped


class Scaled(NamedTuple):
    """What was found out about a step."""

    config: ConfigDict
    chip: Chip
    mesh: dict[str, int]  # devices by axis
    parameters: int
    memory: Memory
    flops: int  # of the matrix products of a step, all devices together, what is computed again included
    collectives: list[Collective]
    forecast: roofline.Forecast
    compile_seconds: float


def with_mesh(config: ConfigDict, mesh: Mapping[str, int]) -> ConfigDict:
    """The config on that mesh; axes that are not named have one device."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update({axis: mesh.get(axis, 1) for axis in sharding.AXES})
    return config.lock()


def program(config: ConfigDict, chip: Chip) -> Program:
    """The step that training would repeat on such chips.

    Args:
      config: as gptjax.planning.costs.planned gives it.
      chip: what it is for; its kernels are chosen.
    """
    mesh = sharding.make_mesh(**config.mesh)
    divided = sharding.sharded_dimensions(mesh)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.kernels = kernels.resolve_kernels(config.model.kernels, divided, chip.platform)
    config.lock()
    dtype = config.train.dtype
    if dtype == "bfloat16" and chip.platform != jax.default_backend() == "cpu":
        dtype = "float16"
    model = models.build(config.model, dtype, divided, methods.make_attached(config.finetune))
    start = costs.start_of(config, model)
    shapes = jax.eval_shape(start)
    step = make_train_step(config, objectives.loss(config, model), optim.optimizer(config), mesh, shapes)
    return Program(config, mesh, start, shapes, step)


def bytes_per_device(tree: Any, there: Any) -> int:
    """Of a tree of shapes, divided as its tree of places says; one place stands for all."""
    if isinstance(there, NamedSharding):
        there = jax.tree.map(lambda leaf: there, tree)

    def of_leaf(leaf: Any, place: Any) -> int:
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, there)))


def state_bytes(mesh: Any, shapes: TrainState, config: ConfigDict) -> Memory:
    """What lies on a device between steps, without temporaries: exact.

    Args:
      mesh: or a jax.sharding.AbstractMesh, for which no device is needed.
      shapes: of the state.
      config: of the run.
    """
    there = sharding.state_shardings(mesh, shapes)
    batch = costs.batch_shapes(config)
    parameters = bytes_per_device((shapes.params, shapes.frozen), (there.params, there.frozen))
    optimizer = bytes_per_device(shapes.opt_state, there.opt_state)
    return Memory(parameters, optimizer, bytes_per_device(batch, sharding.batch_shardings(mesh, batch)), 0)


def abstract(mesh: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices."""
    sizes = tuple(mesh.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def flops(config: ConfigDict, chip: Chip) -> int:
    """Of the matrix products of a step, counted from its program for one device."""
    alone = program(with_mesh(config, {}), chip)
    return matmuls.flops_by_place(alone.step.trace(alone.shapes, costs.batch_shapes(config)).jaxpr).total()


def compiled(built: Program) -> tuple[jax.stages.Compiled, float]:
    """The program for its mesh, and the seconds that it took to compile."""
    began = time.monotonic()
    state = shapes_on(built.shapes, sharding.state_shardings(built.mesh, built.shapes))
    batch = costs.batch_shapes(built.config)
    batch = shapes_on(batch, sharding.batch_shardings(built.mesh, batch))
    return built.step.lower(state, batch).compile(), time.monotonic() - began


def read(built: Program, found: jax.stages.Compiled, seconds: float, chip: Chip, counted: int) -> Scaled:
    """What a compiled step says of itself, and how long it should take.

    Args:
      built: as `program` gives it.
      found, seconds: as `compiled` does.
      chip: that it is for.
      counted: as `flops` does.

    Raises:
      ConfigError: XLA does not tell its memory.
    """
    said, text = found.memory_analysis(), found.as_text()
    if said is None or text is None:
        raise ConfigError(f"XLA does not say what a program needs on {jax.default_backend()}; set JAX_PLATFORMS=cpu")
    mesh = dict(built.mesh.shape)
    temporaries = said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    memory = state_bytes(built.mesh, built.shapes, built.config)._replace(temporaries=temporaries)
    exchanged = collectives.collectives(text, mesh)
    sent = [roofline.Sent(one.axes, one.group, one.sent * one.times) for one in exchanged]
    moved = hlo.traffic(text) if chip.is_measured() else roofline.optimizer_traffic(memory.parameters, memory.optimizer)
    forecast = roofline.forecast(work(built.config, built.shapes, counted), built.mesh.size, moved, sent, chip)
    count = parameter_count(built.shapes.eval_shapes())
    return Scaled(built.config, chip, mesh, count, memory, counted, exchanged, forecast, seconds)


def work(config: ConfigDict, shapes: TrainState, counted: int) -> roofline.Work:
    """What a step has to do, on whatever mesh."""
    tokens = config.data.batch_size * config.data.context
    return roofline.Work(
        counted, metrics.flops_per_token(shapes.eval_shapes(), config.model, config.data.context), tokens
    )


def scaled(config: ConfigDict, chip: Chip) -> Scaled:
    """Compiles a config's step for its mesh, and reads it.

    Args:
      config: as gptjax.planning.costs.planned gives it.
      chip: see gptjax.planning.chips.
    """
    built = program(config, chip)
    return read(built, *compiled(built), chip, flops(config, chip))


class Measured(NamedTuple):
    """What was found by running."""

    step: float  # seconds, the mean
    bytes: int  # on one device
    how: str  # the bytes were measured


def compared(config: ConfigDict, chip: Chip, steps: int) -> tuple[Scaled, Measured]:
    """As `scaled`, and what the same program then takes on the devices that are here.

    Args:
      config: as gptjax.planning.costs.planned gives it.
      chip: this machine's.
      steps: to time.
    """
    built = program(config, chip)
    found, seconds = compiled(built)
    foreseen = read(built, found, seconds, chip, flops(config, chip))
    return foreseen, _run(built, found, steps)


def _run(built: Program, found: jax.stages.Compiled, steps: int) -> Measured:
    device = built.mesh.devices.flat[0]
    state = jax.jit(built.start, out_shardings=sharding.state_shardings(built.mesh, built.shapes))()
    batch = sharding.place_batch(costs.random_batch(built.config), built.mesh)
    arrays = jax.tree.leaves((jax.block_until_ready(state), batch))
    held = sum(part.data.nbytes for array in arrays for part in array.addressable_shards if part.device == device)
    before = resident(reset=True)
    state, _ = costs.repeat(found, state, batch, costs.WARM_UP, lambda n: None)
    grown = (resident() - before) // built.mesh.size
    _, seconds = costs.repeat(found, state, batch, steps, lambda n: None)
    told = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if told is not None:
        return Measured(seconds / steps, told, "the device's peak")
    return Measured(seconds / steps, held + grown, "arrays, and what the process grew by in the first steps")


def resident(reset: bool = False) -> int:
    """Bytes of this process in memory: the most since the last reset, or now where it is reset; Linux only, else 0."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept would be taken again without growing
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    except (OSError, AttributeError):
        return 0
    return int(lines["VmRSS" if reset else "VmHWM"].split()[0]) * 1024
