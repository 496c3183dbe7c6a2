"""A compiled program's text as data: its computations, their instructions, and how often each of them runs.

Reads the text that XLA prints (`compiled.as_text()`); starts nothing and knows nothing of models.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """An array's."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes; nothing for tokens."""
        digits = re.search(r"\d+", self.dtype)
        of_one = max(int(digits[0]) // 8, 1) if digits else int(self.dtype == "pred")
        return math.prod(self.sizes) * of_one


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    op: str
    type: str  # of the result: an array's, or a tuple's in parentheses
    rest: str  # operands, `)`, attributes
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of the arrays in the result."""
        return sum(shape.bytes for shape in shapes(self.type))


def shapes(text: str) -> list[Shape]:
    """Of every array that a type names: "(f32[2,3]{1,0}, s32[])" has two."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    return [Shape(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found]


def elements(type_: str) -> list[str]:
    """The types that a tuple's type holds, outermost only; of any other type itself."""
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
    """The instructions of each computation by its name, and the name of the one that is run."""
    found: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif instruction := parsed(line):
            found.setdefault(current, []).append(instruction)
    return found, entry or current


def parsed(line: str) -> Instruction | None:
    """The instruction in a line; None where there is none."""
    named = NAMED.match(line)
    if not named:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[named.end() :])
    end = _end_of_type(rest)
    op = OPCODE.match(rest, end)
    return Instruction(named[2], op[1], rest[:end].strip(), rest[op.end() :], bool(named[1])) if op else None


def _end_of_type(text: str) -> int:
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            return at
    return len(text)


def times(found: dict[str, list[Instruction]], entry: str) -> Counter[str]:
    """How often each computation runs by itself; what is part of a fusion or of a reduction is not here.

    A loop whose length XLA does not know counts once, and so does every branch of a condition.
    """
    total: Counter[str] = Counter()

    def run(name: str, often: int) -> None:
        total[name] += often
        for instruction in found.get(name, []):
            for inner, repeated in _called(instruction):
                run(inner, often * repeated)

    run(entry, 1)
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
            listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
            names = listed[1].split(",") if listed else re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
            for name in names:
                yield name.strip().lstrip("%"), 1


# Instructions that move nothing, and those whose work is counted elsewhere.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-done", "dot",
}  # fmt: skip


def traffic(text: str) -> int:
    """Bytes that a program writes to memory and reads again, products' own results aside; a rough count.

    Each result is taken as written once and read once; of what is changed in place only the part that changes counts.
    """
    found, entry = computations(text)
    by_name = {one.name: one for body in found.values() for one in body}
    total = 0
    for name, often in times(found, entry).items():
        for one in found.get(name, []):
            if one.op not in FREE and not one.op.startswith(COLLECTIVE):
                total += 2 * often * _written(one, found, by_name)
    return total


COLLECTIVE = ("all-", "reduce-scatter", "collective-", "ragged-all")


def _written(one: Instruction, found: dict[str, list[Instruction]], by_name: dict[str, Instruction]) -> int:
    fused = re.search(r"calls=%?([\w.\-]+)", one.rest) if one.op == "fusion" else None
    within = found.get(fused[1], []) if fused else [one]
    if any(inner.op == "dot" for inner in within):
        return 0
    whole = one.bytes
    for inner in within:
        operands = re.findall(r"%([\w.\-]+)", inner.rest)
        if inner.op == "dynamic-update-slice" and inner.bytes == whole and operands[1] in by_name:
            return by_name[operands[1]].bytes
    return whole
