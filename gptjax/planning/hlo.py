"""Parses the text of a compiled program: its computations, their instructions, and the number of their executions.

The text is that of `compiled.as_text()`; nothing here depends on models or runs anything.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """Shape and dtype of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes; 0 for tokens."""
        digits = re.search(r"\d+", self.dtype)
        item_bytes = max(int(digits[0]) // 8, 1) if digits else int(self.dtype == "pred")
        return math.prod(self.sizes) * item_bytes


class Instruction(NamedTuple):
    """An instruction of a computation."""

    name: str
    op: str
    type: str  # type of the result: an array's, or a tuple's in parentheses
    rest: str  # operands, `)` and attributes
    is_root: bool

    @property
    def bytes(self) -> int:
        """Size of the result's arrays in bytes."""
        return sum(shape.bytes for shape in shapes(self.type))


def shapes(text: str) -> list[Shape]:
    """Returns the shapes of the arrays in a type, such as the two of "(f32[2,3]{1,0}, s32[])"."""
    matches = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return [Shape(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in matches]


def tuple_elements(type_: str) -> list[str]:
    """Returns the element types of a tuple type, not nested; any other type is its own element."""
    if not type_.startswith("("):
        return [type_]
    parts, depth, start = [], 0, 1
    for at, letter in enumerate(type_):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(type_[start:at].strip())
            start = at + 1
    return [part for part in parts if part]


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation by name, and the name of the entry computation."""
    result: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = header[2]
            result[current] = []
            entry = current if header[1] else entry
        elif instruction := parse_instruction(line):
            result.setdefault(current, []).append(instruction)
    return result, entry or current


def parse_instruction(line: str) -> Instruction | None:
    """Parses an instruction; returns None for other lines."""
    match = ASSIGNMENT.match(line)
    if not match:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    end = _end_of_type(rest)
    op = OPCODE.match(rest, end)
    return Instruction(match[2], op[1], rest[:end].strip(), rest[op.end() :], bool(match[1])) if op else None


def _end_of_type(text: str) -> int:
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return at
    return len(text)


def execution_counts(computations: dict[str, list[Instruction]], entry: str) -> Counter[str]:
    """Counts the executions of each computation, without those inside fusions and reductions.

    A loop of unknown length counts once, and so does each branch of a conditional.
    """
    total: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        total[name] += count
        for instruction in computations.get(name, []):
            for inner, trips in _called(instruction):
                visit(inner, count * trips)

    visit(entry, 1)
    return total


def _called(instruction: Instruction) -> Iterator[tuple[str, int]]:
    rest = instruction.rest
    match instruction.op:
        case "while":
            trips = TRIPS.search(rest)
            for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", rest):
                yield name, int(trips[1]) if trips else 1
        case "call" | "async-start":
            for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", rest):
                yield name, 1
        case "conditional":
            match = re.search(r"branch_computations=\{([^}]*)\}", rest)
            names = match[1].split(",") if match else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
            for name in names:
                yield name.strip().lstrip("%"), 1


# Instructions without memory traffic, and those that are counted elsewhere.
NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-done", "dot",
}  # fmt: skip


def traffic(text: str) -> int:
    """Estimates the bytes that a program writes to memory and reads again, without the results of matrix products.

    Each result counts as written once and read once; of an in-place update only the updated part counts.
    """
    bodies, entry = computations(text)
    by_name = {one.name: one for body in bodies.values() for one in body}
    total = 0
    for name, count in execution_counts(bodies, entry).items():
        for one in bodies.get(name, []):
            if one.op not in NO_TRAFFIC and not one.op.startswith(COLLECTIVE):
                total += 2 * count * _written(one, bodies, by_name)
    return total


COLLECTIVE = ("all-", "reduce-scatter", "collective-", "ragged-all")


def _written(one: Instruction, bodies: dict[str, list[Instruction]], by_name: dict[str, Instruction]) -> int:
    fused = re.search(r"calls=%?([\w.\-]+)", one.rest) if one.op == "fusion" else None
    within = bodies.get(fused[1], []) if fused else [one]
    if any(inner.op == "dot" for inner in within):
        return 0
    size = one.bytes
    for inner in within:
        operands = re.findall(r"%([\w.\-]+)", inner.rest)
        if inner.op == "dynamic-update-slice" and inner.bytes == size and operands[1] in by_name:
            return by_name[operands[1]].bytes
    return size
