"""What a compiled program sends between devices: each collective, how often it runs, and over which axes of the mesh.

Reads the text of the program that each device runs (`compiled.as_text()`); starts nothing.
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
    """One collective of a program, as each device runs it."""

    op: str  # of OPS
    bytes: int  # of the result, on one device, of one time
    axes: tuple[str, ...]  # of the mesh: the devices that take part differ in their places along these
    times: int  # a step
    shapes: tuple[Shape, ...]  # of the result's arrays
    group: tuple[int, ...]  # devices that take part together, the first group; places in the flattened mesh

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time, by the algorithm that sends least (a ring's)."""
        n, result = len(self.group), self.bytes
        return {
            "all-reduce": 2 * (n - 1) / n * result,
            "all-gather": (n - 1) / n * result,
            "reduce-scatter": (n - 1.0) * result,
            "all-to-all": (n - 1) / n * result,
            "collective-permute": float(result),
        }[self.op]


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective that a program runs, in its order; groups of one device are left out.

    A reduction that XLA has promoted from 16 to 32 bits, as it does for CPUs, counts with the bytes that were asked
    for. Other collectives in bfloat16 XLA's CPU compiler runs in float32; those in float16 it leaves.

    Args:
      text: of the compiled program.
      mesh_shape: devices by axis, in the order of the mesh.
    """
    found, entry = hlo.computations(text)
    listed = []
    for name, times in hlo.times(found, entry).items():
        for instruction in found.get(name, []):
            op = instruction.op.removesuffix("-start")
            if op in OPS:
                group, axes = participants(op, instruction.rest, mesh_shape)
                if len(group) > 1:
                    result = _result(instruction)
                    size = sum(shape.bytes for shape in result) // (2 if _is_promoted(instruction) else 1)
                    listed.append(Collective(op, size, axes, times, tuple(result), group))
    return listed


def _is_promoted(instruction: Instruction) -> bool:
    return bool(re.search(r"to_apply=%?[\w.\-]*promoted", instruction.rest))


def _result(instruction: Instruction) -> list[Shape]:
    parts = hlo.elements(instruction.type)
    # These begin with what they were given: (operands, results, ...).
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        return hlo.shapes(parts[1])
    return hlo.shapes(instruction.type)


def participants(op: str, rest: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(group, axes) of a collective, by the attributes that stand behind its operands.

    Raises:
      ValueError: groups in a form that is not known.
    """
    everyone = range(math.prod(mesh_shape.values()))
    if op == "collective-permute":
        listed = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)", listed[0] if listed else "")]
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        axes = {axis for pair in moved for axis in spanned(pair, mesh_shape)}
        return (moved or [(0,)])[0], tuple(axis for axis in mesh_shape if axis in axes)
    group = tuple(_first_group(rest, everyone))
    return group, spanned(group, mesh_shape)


def spanned(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which these places of the flattened mesh differ."""
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, places, strict=True) if len(set(along.tolist())) > 1)


def _first_group(rest: str, everyone: Sequence[int]) -> Sequence[int]:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return [int(device) for device in listed[1].split(",")]
    if re.search(r"replica_groups=\{\}", rest) or "replica_groups=" not in rest:
        return everyone
    # [groups,devices in each]<=[sizes of an array of all devices]T(its axes in another order)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        return np.arange(len(everyone)).reshape(sizes).transpose(order).reshape(groups)[0].tolist()
    # mesh['a'=4,'b'=2] {'b'}; 'a':(2)2 is a part of an axis: after the first 2 of it the next 2. device_ids=
    # ([2,4]T(1,0)) are the devices in the order of such an array, and device_ids=(0,2,1,3) just these.
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", rest):
        return _by_axes(named[1], _ordered(named[2] or "", len(everyone)), named[3])
    raise ValueError(f"replica groups that this reader does not know: {rest[:200]}")


def _ordered(order: str, devices: int) -> Any:
    array = np.arange(devices)
    if turned := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        sizes, axes = ([int(n) for n in part.split(",")] if part else None for part in turned.groups())
        return array.reshape(sizes).transpose(axes)
    return np.array([int(device) for device in order.split(",")]) if order else array


def _by_axes(sizes: str, ordered: Any, wanted: str) -> list[int]:
    devices = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    kept = {name: [0] for name in devices}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted):
        number = int(size or devices[name])
        step = devices[name] // (int(before or 1) * number)
        kept[name] = [at * step for at in range(number)]
    group: list[int] = ordered.reshape(tuple(devices.values()))[np.ix_(*kept.values())].ravel().tolist()
    return group


def along(mesh_shape: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """The first group of devices that differ along these axes of the mesh."""
    array = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    return tuple(array[tuple(slice(None) if axis in axes else 0 for axis in mesh_shape)].ravel().tolist())


def link(group: Sequence[int], chip: Chip) -> tuple[str, float]:
    """("near", bytes per second a device) for a group within a node, or ("far", ...) for one that leaves it.

    A ring through several nodes leaves each of them as often as it has members there, by the link of each.
    """
    together = sum(device // chip.node == group[0] // chip.node for device in group)
    return ("near", chip.near) if together == len(group) else ("far", min(chip.near, together * chip.far))
