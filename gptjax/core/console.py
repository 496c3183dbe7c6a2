"""What a person watching sees: lines, and a bar with the time left; plain lines where the output is no terminal.

Everything here goes to stderr; a command's results go to stdout.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
Rows = Sequence[Sequence[str]]  # of a table; the first has the columns' names


_speaks = [True]


def speaks(wanted: bool) -> None:
    """Whether this process tells a person anything: of several that do the same only one should."""
    _speaks[0] = wanted


def say(message: str) -> None:
    """Prints one line."""
    if _speaks[0]:
        _print(message)


def _print(message: str) -> None:
    with suppress(OSError):  # nobody reads it, or the disk is full on which it is kept: no reason to end what is done
        print(message, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    """Keeps the block from telling anything; yields a `say` that still tells, unless nothing was to be told before."""
    before = _speaks[0]
    _speaks[0] = False

    def still(message: str) -> None:
        if before:
            _print(message)

    try:
        yield still
    finally:
        _speaks[0] = before


def is_watched() -> bool:
    """Whether a person sees stderr as it comes, on a terminal."""
    return sys.stderr.isatty() and _speaks[0]


def duration(seconds: float) -> str:
    """1:05 or 2:01:05."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@contextmanager
def bar(label: str, total: float | None, done: float = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar for the block; yields `advance(amount, **facts)`, whose facts are shown beside the bar.

    Args:
      label: what is being done.
      total: when it is done, in any unit; None where nobody knows.
      done: where it starts, not counted in the time left.
      unit: "B" for bytes, whose rate is shown.
    """
    draw = _terminal_bar if is_watched() else _plain_lines
    with draw(label, total, done, unit) as advance:
        yield advance


@contextmanager
def _terminal_bar(label: str, total: float | None, done: float, unit: str) -> Iterator[Callable[..., None]]:
    from rich import progress
    from rich.console import Console

    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        *([progress.TransferSpeedColumn()] if unit == "B" else []),
        progress.TextColumn("{task.fields[facts]}"),
        *([] if total is None else [progress.TimeRemainingColumn(compact=True), progress.TextColumn("left")]),
    ]
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=total, completed=int(done), facts="")
        known: dict[str, Any] = {}

        def advance(amount: float = 1, **facts: Any) -> None:
            known.update(facts)
            shown.update(task, advance=amount, facts=_facts(known))

        yield advance


@contextmanager
def _plain_lines(label: str, total: float | None, done: float, unit: str) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    at = first = done
    known: dict[str, Any] = {}

    def advance(amount: float = 1, **facts: Any) -> None:
        nonlocal at, last
        known.update(facts)
        at, now = at + amount, time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and total and at > first:
            last = now
            rate = (at - first) / (now - start)
            speed = f"{rate / 1e6:.1f} MB/s" if unit == "B" else ""
            left = f"{duration((total - at) / rate)} left"
            say("  ".join(filter(None, [f"{label} {at / total:4.0%}", speed, _facts(known), left])))

    yield advance


def _facts(facts: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())


def aligned(rows: Rows) -> list[str]:
    """Rows of the same length as lines with columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
