"""Searches the meshes that a run fits on and predicts the fastest, without compiling any.

The memory of a device between steps is exact, from the shardings. Temporaries and communication are estimated for the
Transformer of gptjax.models; gptjax.planning.compiled_plan then compiles the best candidates.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gptjax import sharding
from gptjax.models.layers import GATES
from gptjax.planning import collectives, compiled_plan, roofline
from gptjax.planning.chips import Chip
from gptjax.planning.compiled_plan import Memory
from gptjax.planning.roofline import Forecast, Transfer
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.training import mesh_checks

LONG = 8192  # tokens of a sequence from which on context parallelism pays


class Candidate(NamedTuple):
    """A mesh and its predicted cost."""

    config: ConfigDict  # with the mesh and the gradient accumulation that it needs to fit
    memory: Memory  # temporaries are an estimate
    forecast: Forecast


def candidate_meshes(config: ConfigDict, devices: int) -> list[dict[str, int]]:
    """Returns all factorizations of the devices over the axes that a config can use.

    Args:
      config: resolved config.
      devices: number of devices.
    """
    axes = ["data", "fsdp", "tensor"]
    axes += ["expert"] if config.model.mlp == "experts" else []
    axes += ["context"] if config.data.context >= LONG else []
    partial: list[dict[str, int]] = [{}]
    for axis in axes[1:]:
        partial = [mesh | {axis: size} for mesh in partial for size in divisors(devices // math.prod(mesh.values()))]
    return [mesh | {"data": devices // math.prod(mesh.values())} for mesh in partial]


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def search(config: ConfigDict, devices: int, chip: Chip, advance: Callable[..., None]) -> list[Candidate]:
    """Returns the meshes that fit, sorted by predicted step time.

    Each has the least gradient accumulation, at least the config's, with which it fits.

    Args:
      config: result of gptjax.planning.costs.resolve.
      devices: number of devices.
      chip: chip of each device.
      advance: called after each mesh.
    """
    program = compiled_plan.build(compiled_plan.with_mesh(config, {}), chip)
    work = compiled_plan.work(config, program.shapes, compiled_plan.count_flops(config, chip))
    fitting = []
    for mesh in candidate_meshes(config, devices):
        for one in _accumulations(compiled_plan.with_mesh(config, mesh), devices):
            sizes = sharding.mesh_sizes(one.mesh, devices)
            memory = compiled_plan.state_bytes(compiled_plan.abstract_mesh(sizes), program.shapes, one)
            memory = memory._replace(temporaries=round(temporary_bytes(one, program, sizes, memory.parameters)))
            if memory.total <= chip.memory:
                traffic = roofline.optimizer_traffic(memory.parameters, memory.optimizer)
                transfers = communication(one, sizes, memory.parameters)
                fitting.append(Candidate(one, memory, roofline.forecast(work, devices, traffic, transfers, chip)))
                break
        advance(1)
    return sorted(fitting, key=lambda candidate: candidate.forecast.step)


def _accumulations(config: ConfigDict, devices: int) -> Iterator[ConfigDict]:
    least = config.train.grad_accumulation
    for slices in divisors(config.data.batch_size // least):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.train.grad_accumulation = slices * least
        if next(mesh_checks.problems(config, devices), None) is None:
            yield config.lock()


class DeviceShare(NamedTuple):
    """Sizes of one device's share of one slice of a batch."""

    tokens: float
    item: int  # bytes of a number in the compute dtype
    model: Any  # config.model
    tensor: int


def _device_share(config: ConfigDict, mesh: dict[str, int]) -> DeviceShare:
    others = math.prod(size for axis, size in mesh.items() if axis != "tensor")
    tokens = config.data.batch_size * config.data.context / config.train.grad_accumulation / others
    return DeviceShare(tokens, 2 if config.train.dtype == "bfloat16" else 4, config.model, mesh["tensor"])


def layer_bytes(s: DeviceShare, context: int) -> float:
    """Returns the bytes that a block stores for its backward pass (arXiv 2205.05198 section 4.1, float32 scores).

    Args:
      s: a device's share of a slice.
      context: tokens of a sequence.
    """
    m = s.model
    heads = (2 * m.heads + 2 * m.kv_heads) * m.head_width
    hidden = m.mlp_width * (3 if m.activation in GATES else 2) * (m.experts_per_token if m.mlp == "experts" else 1)
    return s.tokens * (s.item * (8 * m.width + (heads + hidden) / s.tensor) + 2 * 4 * m.heads * context / s.tensor)


def temporary_bytes(config: ConfigDict, program: compiled_plan.Program, mesh: dict[str, int], parameters: int) -> float:
    """Estimates the peak bytes of activations and gradients on a device.

    Args:
      config: config with its mesh and gradient accumulation.
      program: program for one device.
      mesh: devices by axis.
      parameters: bytes of the parameters on a device.
    """
    s, layers, T = _device_share(config, mesh), config.model.layers, config.data.context
    in_blocks = block_fraction(program.shapes)
    gathered = parameters / 4 * mesh["fsdp"]  # parameters gathered for matrix products
    one_layer = gathered * in_blocks / layers * (s.item + 4)
    per_layer = layer_bytes(s, T)
    stored = {
        "full": s.tokens * config.model.width * s.item * layers + 2 * per_layer + one_layer,
        "dots": per_layer / 2 * layers + 2 * per_layer + gathered * in_blocks * s.item,
        "none": per_layer * layers + per_layer + gathered * in_blocks * s.item,
    }[config.model.remat]
    V = config.model.vocabulary
    logits = 4 * s.tokens * V / (s.tensor if V % s.tensor == 0 else 1)
    logits = min(logits, 2**30) if program.config.model.kernels == "gpu" else logits
    gradients = parameters * (2 if config.train.grad_accumulation > 1 else 1)
    return stored + 3 * logits + gradients + gathered * (1 - in_blocks) * (s.item + 4)


def block_fraction(shapes: TrainState) -> float:
    """Returns the fraction of the parameters that is in blocks."""
    inside = {name: value for name, value in shapes.params.items() if name.startswith("block")}
    return parameter_count(inside) / parameter_count(shapes.params)


def communication(config: ConfigDict, mesh: dict[str, int], parameters: int) -> list[Transfer]:
    """Estimates the bytes that each device sends in a step.

    Args:
      config: config with its mesh and gradient accumulation.
      mesh: devices by axis.
      parameters: bytes of the parameters on a device.
    """
    s, slices, m = _device_share(config, mesh), config.train.grad_accumulation, config.model
    gathered, again = parameters / 4 * mesh["fsdp"], 1 if m.remat == "none" else 2
    stream = s.tokens * m.width * s.item * m.layers
    keys_values = 2 * s.tokens * m.kv_heads * m.head_width / s.tensor * s.item * m.layers
    passes = 2 + (m.remat != "none")
    bytes_by_axis = {
        # All-gather of parameters for each pass, reduce-scatter of gradients in float32.
        "fsdp": _fraction(mesh["fsdp"]) * gathered * (again * s.item + 4) * slices,
        # All-reduce of gradients in float32.
        "data": 2 * _fraction(mesh["data"]) * parameters * slices,
        # All-reduces after attention and after the MLP in each pass; the last one is not rematerialized.
        "tensor": 2 * _fraction(mesh["tensor"]) * stream * (4 + (m.remat != "none")) * slices,
        # Keys and values go to all other devices of a sequence, and gradients are all-reduced.
        "context": ((mesh["context"] - 1) * keys_values * passes + 2 * _fraction(mesh["context"]) * gathered * s.item)
        * slices,
        # Tokens go to all devices with experts, and their sums return.
        "expert": 2 * (mesh["expert"] - 1) * stream * passes * slices,
    }
    return [
        Transfer((axis,), collectives.group_along(mesh, (axis,)), sent)
        for axis, sent in bytes_by_axis.items()
        if mesh[axis] > 1
    ]


def _fraction(devices: int) -> float:
    return (devices - 1) / devices
