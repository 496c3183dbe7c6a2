"""Which meshes a run fits on, and which should be fastest: all ways to divide so many devices, without compiling any.

What lies on a device between steps is exact, from the shardings. What a step needs besides and what it sends are
estimated here, for a Transformer as gptjax.models makes it; gptjax.planning.compiled_plan then compiles the best of
them.
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
from gptjax.planning.roofline import Forecast, Sent
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.training import mesh_checks

LONG = 8192  # tokens of a sequence that is worth dividing


class Candidate(NamedTuple):
    """A mesh, with what is foreseen of it."""

    config: ConfigDict  # with the mesh, and as many slices as it takes to fit
    memory: Memory  # temporaries are an estimate
    forecast: Forecast


def meshes(config: ConfigDict, devices: int) -> list[dict[str, int]]:
    """All ways to divide devices among the axes that a config has a use for.

    Args:
      config: resolved.
      devices: how many.
    """
    axes = ["data", "fsdp", "tensor"]
    axes += ["expert"] if config.model.mlp == "experts" else []
    axes += ["context"] if config.data.context >= LONG else []
    found: list[dict[str, int]] = [{}]
    for axis in axes[1:]:
        found = [mesh | {axis: size} for mesh in found for size in divisors(devices // math.prod(mesh.values()))]
    return [mesh | {"data": devices // math.prod(mesh.values())} for mesh in found]


def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def search(config: ConfigDict, devices: int, chip: Chip, advance: Callable[..., None]) -> list[Candidate]:
    """The meshes that fit, those with the shortest foreseen step first.

    Each has the fewest slices (train.grad_accumulation, at least the config's) with which it fits.

    Args:
      config: as gptjax.planning.costs.planned gives it.
      devices: how many.
      chip: what each is.
      advance: is told of each mesh that was looked at.
    """
    built = compiled_plan.program(compiled_plan.with_mesh(config, {}), chip)
    work = compiled_plan.work(config, built.shapes, compiled_plan.flops(config, chip))
    fitting = []
    for mesh in meshes(config, devices):
        for one in _sliced(compiled_plan.with_mesh(config, mesh), devices):
            sizes = sharding.mesh_sizes(one.mesh, devices)
            memory = compiled_plan.state_bytes(compiled_plan.abstract(sizes), built.shapes, one)
            memory = memory._replace(temporaries=round(temporaries(one, built, sizes, memory.parameters)))
            if memory.total <= chip.memory:
                moved = roofline.optimizer_traffic(memory.parameters, memory.optimizer)
                sent = exchanges(one, sizes, memory.parameters)
                fitting.append(Candidate(one, memory, roofline.forecast(work, devices, moved, sent, chip)))
                break
        advance(1)
    return sorted(fitting, key=lambda candidate: candidate.forecast.step)


def _sliced(config: ConfigDict, devices: int) -> Iterator[ConfigDict]:
    least = config.train.grad_accumulation
    for slices in divisors(config.data.batch_size // least):
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.train.grad_accumulation = slices * least
        if next(mesh_checks.problems(config, devices), None) is None:
            yield config.lock()


class Sizes(NamedTuple):
    """Of one device's share of one slice of a batch."""

    tokens: float
    item: int  # bytes of a number of the arithmetic
    model: Any  # config.model
    tensor: int


def _sizes(config: ConfigDict, mesh: dict[str, int]) -> Sizes:
    others = math.prod(size for axis, size in mesh.items() if axis != "tensor")
    tokens = config.data.batch_size * config.data.context / config.train.grad_accumulation / others
    return Sizes(tokens, 2 if config.train.dtype == "bfloat16" else 4, config.model, mesh["tensor"])


def layer_bytes(s: Sizes, context: int) -> float:
    """Of what a block keeps for its backward pass (arXiv 2205.05198 section 4.1, with scores held in float32).

    Args:
      s: of a device's share.
      context: tokens of a sequence.
    """
    m = s.model
    heads = (2 * m.heads + 2 * m.kv_heads) * m.head_width
    hidden = m.mlp_width * (3 if m.activation in GATES else 2) * (m.experts_per_token if m.mlp == "experts" else 1)
    return s.tokens * (s.item * (8 * m.width + (heads + hidden) / s.tensor) + 2 * 4 * m.heads * context / s.tensor)


def temporaries(config: ConfigDict, built: compiled_plan.Program, mesh: dict[str, int], parameters: int) -> float:
    """Bytes of activations and gradients on a device at the peak, estimated.

    Args:
      config: with its mesh and slices.
      built: of one device.
      mesh: devices by axis.
      parameters: bytes on a device.
    """
    s, layers, T = _sizes(config, mesh), config.model.layers, config.data.context
    of_blocks = share_of_blocks(built.shapes)
    gathered = parameters / 4 * mesh["fsdp"]  # numbers that products read
    one_layer = gathered * of_blocks / layers * (s.item + 4)
    whole = layer_bytes(s, T)
    kept = {
        "full": s.tokens * config.model.width * s.item * layers + 2 * whole + one_layer,
        "dots": whole / 2 * layers + 2 * whole + gathered * of_blocks * s.item,
        "none": whole * layers + whole + gathered * of_blocks * s.item,
    }[config.model.remat]
    V = config.model.vocabulary
    logits = 4 * s.tokens * V / (s.tensor if V % s.tensor == 0 else 1)
    logits = min(logits, 2**30) if built.config.model.kernels == "gpu" else logits
    gradients = parameters * (2 if config.train.grad_accumulation > 1 else 1)
    return kept + 3 * logits + gradients + gathered * (1 - of_blocks) * (s.item + 4)


def share_of_blocks(shapes: TrainState) -> float:
    """Of the parameters, those in blocks."""
    inside = {name: value for name, value in shapes.params.items() if name.startswith("block")}
    return parameter_count(inside) / parameter_count(shapes.params)


def exchanges(config: ConfigDict, mesh: dict[str, int], parameters: int) -> list[Sent]:
    """What each device sends in a step, estimated.

    Args:
      config: with its mesh and slices.
      mesh: devices by axis.
      parameters: bytes on a device.
    """
    s, slices, m = _sizes(config, mesh), config.train.grad_accumulation, config.model
    gathered, again = parameters / 4 * mesh["fsdp"], 1 if m.remat == "none" else 2
    stream = s.tokens * m.width * s.item * m.layers
    keys_values = 2 * s.tokens * m.kv_heads * m.head_width / s.tensor * s.item * m.layers
    passes = 2 + (m.remat != "none")
    bytes_by_axis = {
        # Parameters gathered for each pass, their gradients scattered in float32.
        "fsdp": _part(mesh["fsdp"]) * gathered * (again * s.item + 4) * slices,
        # Gradients summed up in float32, there and back.
        "data": 2 * _part(mesh["data"]) * parameters * slices,
        # Sums after attention and after the MLP, in each pass; but the last one is not computed again.
        "tensor": 2 * _part(mesh["tensor"]) * stream * (4 + (m.remat != "none")) * slices,
        # Each device's keys and values go to all others of its row, and gradients of parameters are summed up.
        "context": ((mesh["context"] - 1) * keys_values * passes + 2 * _part(mesh["context"]) * gathered * s.item)
        * slices,
        # Tokens go to all devices that have experts, and their sums come back.
        "expert": 2 * (mesh["expert"] - 1) * stream * passes * slices,
    }
    return [
        Sent((axis,), collectives.along(mesh, (axis,)), sent) for axis, sent in bytes_by_axis.items() if mesh[axis] > 1
    ]


def _part(devices: int) -> float:
    return (devices - 1) / devices
