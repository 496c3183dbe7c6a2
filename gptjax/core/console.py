"""Messages and progress bars on stderr; plain lines if it is not a terminal. Results of commands go to stdout."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
Rows = Sequence[Sequence[str]]  # a table; the first row has the column names


_enabled = [True]


def set_enabled(enabled: bool) -> None:
    """Enables or disables messages of this process; of several processes only one should print."""
    _enabled[0] = enabled


def say(message: str) -> None:
    """Prints one line."""
    if _enabled[0]:
        _print(message)


def _print(message: str) -> None:
    with suppress(OSError):  # no reader or a full disk is no reason to stop
        print(message, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    """Disables messages in the block; yields a `say` that still prints if messages were enabled before."""
    before = _enabled[0]
    _enabled[0] = False

    def say_anyway(message: str) -> None:
        if before:
            _print(message)

    try:
        yield say_anyway
    finally:
        _enabled[0] = before


def is_interactive() -> bool:
    """Returns True if stderr is a terminal and messages are enabled."""
    return sys.stderr.isatty() and _enabled[0]


def duration(seconds: float) -> str:
    """Formats seconds as 1:05 or 2:01:05."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@contextmanager
def bar(label: str, total: float | None, done: float = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """Shows a progress bar in the block; yields `advance(amount, **facts)`, whose facts are shown next to the bar.

    Args:
      label: description of the work.
      total: amount of work, in any unit; None if unknown.
      done: initial amount, excluded from the estimate of the time left.
      unit: "B" for bytes, which also shows the rate.
    """
    draw = _terminal_bar if is_interactive() else _plain_lines
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
        current: dict[str, Any] = {}

        def advance(amount: float = 1, **facts: Any) -> None:
            current.update(facts)
            shown.update(task, advance=amount, facts=_facts(current))

        yield advance


@contextmanager
def _plain_lines(label: str, total: float | None, done: float, unit: str) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    position = first = done
    current: dict[str, Any] = {}

    def advance(amount: float = 1, **facts: Any) -> None:
        nonlocal position, last
        current.update(facts)
        position, now = position + amount, time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and total and position > first:
            last = now
            rate = (position - first) / (now - start)
            speed = f"{rate / 1e6:.1f} MB/s" if unit == "B" else ""
            left = f"{duration((total - position) / rate)} left"
            say("  ".join(filter(None, [f"{label} {position / total:4.0%}", speed, _facts(current), left])))

    yield advance


def _facts(facts: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in facts.items())


def aligned(rows: Rows) -> list[str]:
    """Formats rows of equal length as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
