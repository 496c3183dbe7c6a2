"""Collectives of a compiled program: their sizes, number of executions, and mesh axes.

Parses the text of the program that each device runs (`compiled.as_text()`); runs nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.planning import hlo
from gptjax.planning.chips import Chip
from gptjax.planning.hlo import Instruction, Shape

OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective of a program, as each device runs it.

    Attributes:
      op: one of OPS.
      bytes: size of the result on one device, per execution.
      axes: mesh axes along which the participating devices differ.
      times: executions per step.
      shapes: shapes of the result's arrays.
      group: the first group of devices that communicate, as indices into the flattened mesh.
    """

    op: str
    bytes: int
    axes: tuple[str, ...]
    times: int
    shapes: tuple[Shape, ...]
    group: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends per execution with the ring algorithm, which sends least."""
        n, result = len(self.group), self.bytes
        return {
            "all-reduce": 2 * (n - 1) / n * result,
            "all-gather": (n - 1) / n * result,
            "reduce-scatter": (n - 1.0) * result,
            "all-to-all": (n - 1) / n * result,
            "collective-permute": float(result),
        }[self.op]


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a program in its order, without groups of one device.

    A reduction that XLA's CPU compiler promotes from 16 to 32 bits counts with its original size. That compiler runs
    other bfloat16 collectives in float32 and does not change those in float16.

    Args:
      text: text of the compiled program.
      mesh_shape: devices by axis, in the order of the mesh.
    """
    computations, entry = hlo.computations(text)
    result = []
    for name, times in hlo.execution_counts(computations, entry).items():
        for instruction in computations.get(name, []):
            op = instruction.op.removesuffix("-start")
            if op in OPS:
                group, axes = participants(op, instruction.rest, mesh_shape)
                if len(group) > 1:
                    shapes = _result_shapes(instruction)
                    size = sum(shape.bytes for shape in shapes) // (2 if _is_promoted(instruction) else 1)
                    result.append(Collective(op, size, axes, times, tuple(shapes), group))
    return result


def _is_promoted(instruction: Instruction) -> bool:
    return bool(re.search(r"to_apply=%?[\w.\-]*promoted", instruction.rest))


def _result_shapes(instruction: Instruction) -> list[Shape]:
    parts = hlo.tuple_elements(instruction.type)
    # The type of these is (operands, results, ...).
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        return hlo.shapes(parts[1])
    return hlo.shapes(instruction.type)


def participants(op: str, rest: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns (group, axes) of a collective from the attributes after its operands.

    Raises:
      ValueError: an unknown format of groups.
    """
    devices = range(math.prod(mesh_shape.values()))
    if op == "collective-permute":
        match = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", match[0] if match else "")]
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        axes = {axis for pair in moved for axis in varying_axes(pair, mesh_shape)}
        return (moved or [(0,)])[0], tuple(axis for axis in mesh_shape if axis in axes)
    group = tuple(_first_group(rest, devices))
    return group, varying_axes(group, mesh_shape)


def varying_axes(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which these indices of the flattened mesh differ."""
    coordinates = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(axis for axis, indices in zip(mesh_shape, coordinates, strict=True) if len(set(indices.tolist())) > 1)


def _first_group(rest: str, devices: Sequence[int]) -> Sequence[int]:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return [int(device) for device in listed[1].split(",")]
    if re.search(r"replica_groups=\{\}", rest) or "replica_groups=" not in rest:
        return devices
    # [groups,devices in each]<=[shape of an array of all devices]T(permutation of its axes)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        return np.arange(len(devices)).reshape(sizes).transpose(order).reshape(groups)[0].tolist()
    # mesh['a'=4,'b'=2] {'b'}; 'a':(2)2 is a part of an axis: the 2 after a factor of 2. device_ids=
    # ([2,4]T(1,0)) is the order of such an array, and device_ids=(0,2,1,3) an explicit one.
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", rest):
        return _by_axes(named[1], _ordered(named[2] or "", len(devices)), named[3])
    raise ValueError(f"unknown format of replica groups: {rest[:200]}")


def _ordered(order: str, devices: int) -> Any:
    array = np.arange(devices)
    if permuted := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        sizes, axes = ([int(n) for n in part.split(",")] if part else None for part in permuted.groups())
        return array.reshape(sizes).transpose(axes)
    return np.array([int(device) for device in order.split(",")]) if order else array


def _by_axes(sizes: str, ordered: Any, axes: str) -> list[int]:
    devices = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    indices = {name: [0] for name in devices}
    for name, factor, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        number = int(size or devices[name])
        step = devices[name] // (int(factor or 1) * number)
        indices[name] = [index * step for index in range(number)]
    group: list[int] = ordered.reshape(tuple(devices.values()))[np.ix_(*indices.values())].ravel().tolist()
    return group


def group_along(mesh_shape: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """Returns the first group of devices that differ along these axes of the mesh."""
    array = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    return tuple(array[tuple(slice(None) if axis in axes else 0 for axis in mesh_shape)].ravel().tolist())


def link(group: Sequence[int], chip: Chip) -> tuple[str, float]:
    """Returns ("near", bytes per second per device) for a group within a node, else ("far", ...).

    A ring over several nodes leaves each node once per member there, over that member's link.
    """
    same_node = sum(device // chip.node == group[0] // chip.node for device in group)
    return ("near", chip.near) if same_node == len(group) else ("far", min(chip.near, same_node * chip.far))
