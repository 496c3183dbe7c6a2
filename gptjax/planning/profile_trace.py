"""Where the time of a compiled program goes: the events of a profile, by the part of the program that they run.

XLA writes an event for each instruction that a thread (CPU) or stream (GPU) executes, with the instruction's name;
the compiled program's text says from which operations, and so from which modules, the instruction was made.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.planning.modules import BETWEEN_DEVICES, ELSE, IDLE, Place, majority, place

CONTAINERS = ("while", "call", "conditional")  # instructions whose events span those of others
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-")
END = "end: "  # begins the name of the event that XLA's CPU threads write when an instruction is complete
CALLERS = ("fusion", "call", "async-start")  # instructions that are the computation which they call
PRODUCTS = ("dot", "convolution", "ragged-dot")

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\((.*)")
OPERAND = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """One line of a compiled program's text."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    op_name: str  # of the operation that it was made from; "" where XLA names none
    calls: str  # the computation that a fusion or call runs; "" for others


class Event(NamedTuple):
    """One execution of an instruction on one thread or stream, times in nanoseconds."""

    instruction: str
    thread: str
    start: float
    end: float
    is_tail: bool = False  # what goes on in the thread pool after the event


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation in a compiled program's text (`Compiled.as_text()`)."""
    found: dict[str, list[Instruction]] = {}
    inside: list[Instruction] = []
    for line in text.splitlines():
        if opening := COMPUTATION.match(line):
            inside = found.setdefault(opening[1], [])
        elif parsed := INSTRUCTION.match(line):
            name, opcode, rest = parsed.groups()
            op_name, called = OP_NAME.search(rest), CALLED.search(rest) if opcode in CALLERS else None
            operands = tuple(OPERAND.findall(rest.split(")", 1)[0]))
            inside.append(
                Instruction(name, opcode, operands, op_name[1] if op_name else "", called[1] if called else "")
            )
    return found


def places(text: str) -> dict[str, Place]:
    """Where each instruction of a compiled program belongs.

    A fusion belongs to its matrix products, where it has some, and else to where most of its operations belong. What
    XLA adds without a name, such as a copy or a change of type, belongs to where its first known operand comes from.
    """
    program = computations(text)
    found: dict[str, Place] = {}

    def within(name: str) -> Iterator[Instruction]:
        for inner in program.get(name, ()):
            yield from within(inner.calls) if inner.calls else (inner,)

    def where(instruction: Instruction) -> Place:
        if instruction.opcode.startswith(COLLECTIVES):  # XLA makes one of many parts' and keeps one name
            return Place(BETWEEN_DEVICES, False)
        inner = list(within(instruction.calls)) if instruction.calls else []
        products = [one for one in inner if one.opcode in PRODUCTS]
        at = majority([place(one.op_name) for one in products or inner], place(instruction.op_name))
        if instruction.op_name or at.part != ELSE:
            return at
        known = (found[one] for one in instruction.operands if one in found and found[one].part != ELSE)
        return next(known, at)

    for instructions in program.values():
        for one in instructions:
            found[one.name] = where(one)
    return found


def containers(text: str) -> set[str]:
    """The instructions whose events span those of the instructions that they run."""
    return {one.name for each in computations(text).values() for one in each if one.opcode in CONTAINERS}


def events(folder: Path, module: str) -> list[Event]:
    """The executed instructions of a program in the newest profile below a folder.

    Args:
      folder: as given to `jax.profiler.trace`.
      module: the program's name, such as `jit_step`; events that name another are left out.
    """
    from jax.profiler import ProfileData

    path = max(folder.rglob("*.xplane.pb"))
    found, ends = [], []
    for plane in ProfileData.from_file(str(path)).planes:
        for number, line in enumerate(plane.lines):
            for event in line.events:
                if event.name.startswith(END):
                    ends.append((event.name.removeprefix(END), event.start_ns))
                facts: Mapping[str, Any] = dict(event.stats)
                if "hlo_op" in facts and str(facts.get("hlo_module", module)).startswith(module):
                    thread, end = f"{plane.name} {number}", event.start_ns + event.duration_ns
                    found.append(Event(str(facts["hlo_op"]), thread, event.start_ns, end))
    return found + tails(found, ends)


def tails(found: Iterable[Event], ends: Iterable[tuple[str, float]]) -> list[Event]:
    """What XLA's CPU threads go on with after the event of the instruction that began it is over.

    Args:
      found: events; that of a large product may be over as soon as the product is handed to the thread pool.
      ends: instructions, and when each was complete.
    """
    begun: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(found, key=lambda event: event.start):
        begun[event.instruction].append(event)
    more = []
    for name, complete in ends:
        before = [event for event in begun.get(name, ()) if event.start <= complete]
        if before and before[-1].end < complete:
            more.append(Event(name, f"pool {name}", before[-1].end, complete, is_tail=True))
    return more


def seconds_by_place(found: Iterable[Event], where: Mapping[str, Place], around: set[str]) -> dict[Place, float]:
    """How the time from the first event's start to the last one's end divides among places, in seconds.

    At each instant the innermost instruction of each busy thread counts, and where several threads are busy they get
    equal shares of the instant, so that all places together have exactly the time that passed. A tail counts only
    where nothing else runs. What is known of no part goes to `ELSE`, and an instant in which nothing runs to `IDLE`.

    Args:
      found: events of any threads, nested or not.
      where: each instruction's place.
      around: instructions that count only where nothing else runs.
    """
    lasting = [event for event in found if event.end > event.start]
    edges = sorted(
        [(event.start, 1, -event.end, event) for event in lasting]
        + [(event.end, 0, -event.start, event) for event in lasting]
    )
    total: dict[Place, float] = defaultdict(float)
    stacks: dict[str, list[Event]] = {}
    before = edges[0][0] if edges else 0.0
    for at, starts, _, event in edges:
        _share(total, at - before, [stack[-1] for stack in stacks.values() if stack], where, around)
        before, stack = at, stacks.setdefault(event.thread, [])
        if starts:
            stack.append(event)
        else:
            stack.remove(event)
    return total


def _share(
    total: dict[Place, float], nanoseconds: float, busy: list[Event], where: Mapping[str, Place], around: set[str]
) -> None:
    inner = [one for one in busy if one.instruction not in around]
    # The end of a tail is written after those instructions that waited for it and ran at once on the same thread.
    running = [one for one in inner if not one.is_tail] or inner or busy
    for one in running:
        total[where.get(one.instruction, Place(ELSE, False))] += nanoseconds * 1e-9 / len(running)
    if not running:
        total[Place(IDLE, False)] += nanoseconds * 1e-9
