"""Compiles the train step of a config for a mesh of virtual devices and analyzes it; allocates and runs nothing.

The memory analysis is that of XLA's CPU compiler; other backends fuse and schedule differently. Two things are adapted
to the chip: the kernels are the chip's (except cuDNN's attention, which CPUs do not have, so that the attention scores
are counted in full), and float16 replaces bfloat16, which has the same size but which the CPU compiler would widen to
float32.
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
    temporaries: int  # activations and gradients at the peak

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


class Program(NamedTuple):
    """A train step, not yet compiled."""

    config: ConfigDict  # resolved, with the kernels of its chip
    mesh: Mesh
    init: Any  # `() -> TrainState`
    shapes: TrainState
    step: jax.stages.Wrapped


class CompiledPlan(NamedTuple):
    """Analysis of a compiled step."""

    config: ConfigDict
    chip: Chip
    mesh: dict[str, int]  # devices by axis
    parameters: int
    memory: Memory
    flops: int  # of a step's matrix products over all devices, rematerialization included
    collectives: list[Collective]
    forecast: roofline.Forecast
    compile_seconds: float


def with_mesh(config: ConfigDict, mesh: Mapping[str, int]) -> ConfigDict:
    """Returns the config with that mesh; axes that are not given have one device."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update({axis: mesh.get(axis, 1) for axis in sharding.AXES})
    return config.lock()


def build(config: ConfigDict, chip: Chip) -> Program:
    """Builds the train step of a config for a chip.

    Args:
      config: result of gptjax.planning.costs.resolve.
      chip: chip whose kernels are used.
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
    init = costs.init_fn(config, model)
    shapes = jax.eval_shape(init)
    step = make_train_step(config, objectives.loss(config, model), optim.optimizer(config), mesh, shapes)
    return Program(config, mesh, init, shapes, step)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Returns the bytes per device of a tree of shapes; `shardings` is a tree of shardings, or one for all leaves."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)

    def of_leaf(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, shardings)))


def state_bytes(mesh: Any, shapes: TrainState, config: ConfigDict) -> Memory:
    """Returns the exact memory of a device between steps, without temporaries.

    Args:
      mesh: a mesh or a jax.sharding.AbstractMesh, which needs no devices.
      shapes: shapes of the state.
      config: config of the run.
    """
    shardings = sharding.state_shardings(mesh, shapes)
    batch = costs.batch_shapes(config)
    parameters = bytes_per_device((shapes.params, shapes.frozen), (shardings.params, shardings.frozen))
    optimizer = bytes_per_device(shapes.opt_state, shardings.opt_state)
    return Memory(parameters, optimizer, bytes_per_device(batch, sharding.batch_shardings(mesh, batch)), 0)


def abstract_mesh(mesh: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices."""
    sizes = tuple(mesh.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def count_flops(config: ConfigDict, chip: Chip) -> int:
    """Returns the FLOPs of a step's matrix products, counted from its program for one device."""
    single = build(with_mesh(config, {}), chip)
    return matmuls.flops_by_scope(single.step.trace(single.shapes, costs.batch_shapes(config)).jaxpr).total()


def compile_step(program: Program) -> tuple[jax.stages.Compiled, float]:
    """Returns the compiled step and the seconds that compiling took."""
    start = time.monotonic()
    state = shapes_on(program.shapes, sharding.state_shardings(program.mesh, program.shapes))
    batch = costs.batch_shapes(program.config)
    batch = shapes_on(batch, sharding.batch_shardings(program.mesh, batch))
    return program.step.lower(state, batch).compile(), time.monotonic() - start


def analyze(
    program: Program, compiled: jax.stages.Compiled, compile_seconds: float, chip: Chip, flops: int
) -> CompiledPlan:
    """Analyzes a compiled step and predicts its time.

    Args:
      program: result of `build`.
      compiled, compile_seconds: result of `compile_step`.
      chip: chip that the step is for.
      flops: result of `count_flops`.

    Raises:
      ConfigError: XLA has no memory analysis on this platform.
    """
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    if analysis is None or text is None:
        raise ConfigError(f"XLA has no memory analysis on {jax.default_backend()}; set JAX_PLATFORMS=cpu")
    mesh = dict(program.mesh.shape)
    temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = state_bytes(program.mesh, program.shapes, program.config)._replace(temporaries=temporaries)
    operations = collectives.collectives(text, mesh)
    transfers = [roofline.Transfer(one.axes, one.group, one.sent * one.times) for one in operations]
    if chip.is_measured():
        traffic = hlo.traffic(text)
    else:
        traffic = roofline.optimizer_traffic(memory.parameters, memory.optimizer)
    total = work(program.config, program.shapes, flops)
    forecast = roofline.forecast(total, program.mesh.size, traffic, transfers, chip)
    count = parameter_count(program.shapes.eval_shapes())
    return CompiledPlan(program.config, chip, mesh, count, memory, flops, operations, forecast, compile_seconds)


def work(config: ConfigDict, shapes: TrainState, flops: int) -> roofline.Work:
    """Returns the work of a step, independent of the mesh."""
    tokens = config.data.batch_size * config.data.context
    return roofline.Work(
        flops, metrics.flops_per_token(shapes.eval_shapes(), config.model, config.data.context), tokens
    )


def compile_plan(config: ConfigDict, chip: Chip) -> CompiledPlan:
    """Compiles a config's step for its mesh and analyzes it.

    Args:
      config: result of gptjax.planning.costs.resolve.
      chip: see gptjax.planning.chips.
    """
    program = build(config, chip)
    return analyze(program, *compile_step(program), chip, count_flops(config, chip))


class Measured(NamedTuple):
    """Measurements of a step.

    Attributes:
      step: mean seconds.
      bytes: memory of one device.
      how: source of `bytes`, in words.
    """

    step: float
    bytes: int
    how: str


def compile_and_measure(config: ConfigDict, chip: Chip, steps: int) -> tuple[CompiledPlan, Measured]:
    """Returns `compile_plan` of a config, and measurements of the same program on this machine's devices.

    Args:
      config: result of gptjax.planning.costs.resolve.
      chip: this machine's chip.
      steps: number of steps to time.
    """
    program = build(config, chip)
    compiled, seconds = compile_step(program)
    return analyze(program, compiled, seconds, chip, count_flops(config, chip)), _measure(program, compiled, steps)


def _measure(program: Program, compiled: jax.stages.Compiled, steps: int) -> Measured:
    device = program.mesh.devices.flat[0]
    state = jax.jit(program.init, out_shardings=sharding.state_shardings(program.mesh, program.shapes))()
    batch = sharding.place_batch(costs.random_batch(program.config), program.mesh)
    arrays = jax.tree.leaves((jax.block_until_ready(state), batch))
    held = sum(part.data.nbytes for array in arrays for part in array.addressable_shards if part.device == device)
    before = resident_bytes(reset=True)
    state, _ = costs.run_steps(compiled, state, batch, costs.WARM_UP, lambda n: None)
    grown = (resident_bytes() - before) // program.mesh.size
    _, seconds = costs.run_steps(compiled, state, batch, steps, lambda n: None)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        return Measured(seconds / steps, peak, "the device's peak")
    return Measured(seconds / steps, held + grown, "arrays plus the growth of the process in the first steps")


def resident_bytes(reset: bool = False) -> int:
    """Returns this process's peak resident bytes since the last reset, or the current ones if reset; 0 off Linux."""
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be reused without growth
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    except (OSError, AttributeError):
        return 0
    return int(lines["VmRSS" if reset else "VmHWM"].split()[0]) * 1024
