"""Attributes the time of a profile's events to the parts of the compiled program.

XLA records an event for each instruction that a thread (CPU) or stream (GPU) executes, with the instruction's name.
The text of the compiled program tells the operations, and so the modules, that the instruction was made from.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.planning.modules import BETWEEN_DEVICES, IDLE, OTHER, Scope, majority, scope_of

CONTAINERS = ("while", "call", "conditional")  # their events span those of other instructions
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-")
END = "end: "  # prefix of the event that XLA's CPU threads record when an instruction completes
CALLERS = ("fusion", "call", "async-start")  # instructions that stand for the computation they call
PRODUCTS = ("dot", "convolution", "ragged-dot")

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\((.*)")
OPERAND = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    op_name: str  # name of its operation; "" if XLA gives none
    calls: str  # computation of a fusion or call; "" for others


class Event(NamedTuple):
    """An execution of an instruction on a thread or stream; times in nanoseconds."""

    instruction: str
    thread: str
    start: float
    end: float
    is_tail: bool = False  # work in the thread pool after the event


def computations(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each computation in a program's text (`Compiled.as_text()`)."""
    result: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if opening := COMPUTATION.match(line):
            current = result.setdefault(opening[1], [])
        elif parsed := INSTRUCTION.match(line):
            name, opcode, rest = parsed.groups()
            op_name, called = OP_NAME.search(rest), CALLED.search(rest) if opcode in CALLERS else None
            operands = tuple(OPERAND.findall(rest.split(")", 1)[0]))
            current.append(
                Instruction(name, opcode, operands, op_name[1] if op_name else "", called[1] if called else "")
            )
    return result


def scopes(text: str) -> dict[str, Scope]:
    """Returns the scope of each instruction of a compiled program.

    A fusion has the scope of its matrix products, or without any that of most of its operations. An instruction without
    a name, such as a copy or a conversion added by XLA, has the scope of its first known operand.
    """
    program = computations(text)
    result: dict[str, Scope] = {}

    def within(name: str) -> Iterator[Instruction]:
        for inner in program.get(name, ()):
            yield from within(inner.calls) if inner.calls else (inner,)

    def scope(instruction: Instruction) -> Scope:
        if instruction.opcode.startswith(COLLECTIVES):  # XLA combines those of several parts under one name
            return Scope(BETWEEN_DEVICES, False)
        inner = list(within(instruction.calls)) if instruction.calls else []
        products = [one for one in inner if one.opcode in PRODUCTS]
        by_name = majority([scope_of(one.op_name) for one in products or inner], scope_of(instruction.op_name))
        if instruction.op_name or by_name.part != OTHER:
            return by_name
        operand_scopes = (result[one] for one in instruction.operands if one in result and result[one].part != OTHER)
        return next(operand_scopes, by_name)

    for instructions in program.values():
        for one in instructions:
            result[one.name] = scope(one)
    return result


def containers(text: str) -> set[str]:
    """Returns the instructions whose events span those of the instructions that they run."""
    return {one.name for each in computations(text).values() for one in each if one.opcode in CONTAINERS}


def events(folder: Path, module: str) -> list[Event]:
    """Returns the executed instructions of a program in the newest profile in a folder.

    Args:
      folder: the `log_dir` of `jax.profiler.trace`.
      module: name of the program, such as `jit_step`; events of others are ignored.
    """
    from jax.profiler import ProfileData

    path = max(folder.rglob("*.xplane.pb"))
    result, ends = [], []
    for plane in ProfileData.from_file(str(path)).planes:
        for number, line in enumerate(plane.lines):
            for event in line.events:
                if event.name.startswith(END):
                    ends.append((event.name.removeprefix(END), event.start_ns))
                stats: Mapping[str, Any] = dict(event.stats)
                if "hlo_op" in stats and str(stats.get("hlo_module", module)).startswith(module):
                    thread, end = f"{plane.name} {number}", event.start_ns + event.duration_ns
                    result.append(Event(str(stats["hlo_op"]), thread, event.start_ns, end))
    return result + tails(result, ends)


def tails(events: Iterable[Event], ends: Iterable[tuple[str, float]]) -> list[Event]:
    """Returns the work of XLA's CPU threads after the end of an instruction's event.

    Args:
      events: events; that of a large product may end as soon as the product is passed to the thread pool.
      ends: instructions, and the times when they completed.
    """
    by_instruction: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.start):
        by_instruction[event.instruction].append(event)
    result = []
    for name, complete in ends:
        before = [event for event in by_instruction.get(name, ()) if event.start <= complete]
        if before and before[-1].end < complete:
            result.append(Event(name, f"pool {name}", before[-1].end, complete, is_tail=True))
    return result


def seconds_by_scope(events: Iterable[Event], scopes: Mapping[str, Scope], containers: set[str]) -> dict[Scope, float]:
    """Divides the time from the first event's start to the last one's end among scopes, in seconds.

    At each instant the innermost instruction of each busy thread counts, and busy threads get equal shares, so that the
    scopes sum to the elapsed time. A tail counts only if nothing else runs. Unknown instructions count as `OTHER`, and
    time in which nothing runs as `IDLE`.

    Args:
      events: events of any threads, nested or not.
      scopes: scope of each instruction.
      containers: instructions that count only if nothing else runs.
    """
    lasting = [event for event in events if event.end > event.start]
    edges = sorted(
        [(event.start, 1, -event.end, event) for event in lasting]
        + [(event.end, 0, -event.start, event) for event in lasting]
    )
    total: dict[Scope, float] = defaultdict(float)
    stacks: dict[str, list[Event]] = {}
    before = edges[0][0] if edges else 0.0
    for at, starts, _, event in edges:
        _share(total, at - before, [stack[-1] for stack in stacks.values() if stack], scopes, containers)
        before, stack = at, stacks.setdefault(event.thread, [])
        if starts:
            stack.append(event)
        else:
            stack.remove(event)
    return total


def _share(
    total: dict[Scope, float], nanoseconds: float, busy: list[Event], scopes: Mapping[str, Scope], containers: set[str]
) -> None:
    inner = [one for one in busy if one.instruction not in containers]
    # The end of a tail is recorded after the instructions that waited for it and ran on the same thread.
    running = [one for one in inner if not one.is_tail] or inner or busy
    for one in running:
        total[scopes.get(one.instruction, Scope(OTHER, False))] += nanoseconds * 1e-9 / len(running)
    if not running:
        total[Scope(IDLE, False)] += nanoseconds * 1e-9
