"""Where a run's wall time goes, each second counted once, over all processes that worked on it.

A run that is under way keeps what its clock says in clock.json, so that the time of a process that was killed is not
forgotten. Imports nothing heavy.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptjax.config.errors import DataError
from gptjax.core import schema
from gptjax.training.monitoring.writers import read_metrics

ALIVE = {
    "start": "imports, reading the data, restoring",
    "compile": "of the train step",
    "step": "dispatching steps and waiting for them",
    "data": "waiting for a batch",
    "eval": "on held-out text, its compilation included",
    "save": "copying checkpoints, and waiting for those being written",
    "profile": "beginning and writing traces",
    "finish": "samples, plot and summary, after the last step",
    "lost": "work after the checkpoint from which the run went on, that had to be done again",
}
DOWN = "down"  # between the end of one process and the start of the next
KINDS = (*ALIVE, DOWN)
SECONDS_BETWEEN_RECORDS = 1.0
SHAPE = {"at": float, "seconds": {str: float}, "marked": (schema.Row(int, {str: float}), None)}  # of clock.json

Reading = dict[str, float]  # seconds by kind


def zero_reading() -> Reading:
    """No second of any kind."""
    return dict.fromkeys(KINDS, 0.0)


def total(reading: Mapping[str, float]) -> float:
    """Seconds in which a process worked on the run."""
    return sum(reading[kind] for kind in ALIVE)


def goodput(reading: Mapping[str, float]) -> float:
    """The share of them that went into steps, 0 to 1."""
    return reading["step"] / total(reading)


def as_metrics(reading: Mapping[str, float]) -> dict[str, float]:
    """{"seconds": ..., "time/start": ..., ...}, to the millisecond."""
    return {"seconds": round(total(reading), 3)} | {f"time/{kind}": round(reading[kind], 3) for kind in KINDS}


class Clock:
    """Seconds by kind; at each moment one kind's are counting.

    Args:
      began: time.monotonic() when the process began.
    """

    def __init__(self, began: float) -> None:
        self.began = self._since = began
        self.kind = "start"
        self.marked: tuple[int, Reading] | None = None
        self._seconds = zero_reading()
        self._lock = threading.Lock()

    def begin(self, kind: str) -> str:
        """From now on the time is of this kind; returns the kind it was of."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self.kind] += now - self._since
            before, self.kind, self._since = self.kind, kind, now
        return before

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """The block's time is of this kind, except what blocks inside it take for theirs."""
        before = self.begin(kind)
        try:
            yield
        finally:
            self.begin(before)

    def reading(self) -> Reading:
        """Seconds by kind until now."""
        self.begin(self.kind)
        return dict(self._seconds)

    def session(self) -> float:
        """Seconds since this process began."""
        return time.monotonic() - self.began

    def mark(self, step: int) -> None:
        """Remembers the reading at which a step was saved."""
        self.marked = step, self.reading()

    def add(self, earlier: Mapping[str, float]) -> None:
        """Counts what earlier processes took."""
        with self._lock:
            self._seconds = {kind: self._seconds[kind] + earlier[kind] for kind in KINDS}

    def lose(self, since: Mapping[str, float], until: Mapping[str, float]) -> None:
        """What passed between two readings is done again: it is lost."""
        with self._lock:
            for kind in ALIVE:
                passed = until[kind] - since[kind]
                self._seconds[kind] -= passed
                self._seconds["lost"] += passed


class Record:
    """clock.json of a run: what its clock said about a second ago.

    Args:
      workdir: a run's directory.
      clock: of this process.
    """

    def __init__(self, workdir: Path, clock: Clock) -> None:
        self.path, self.workdir, self.clock = workdir / "clock.json", workdir, clock

    def go_on(self, step: int) -> None:
        """Adds what earlier processes took to the clock: lost after this step, down while there was none."""
        lines = read_metrics(self.workdir)
        earlier = max(map(_of_line, lines), key=total, default=zero_reading())
        saved = next((_of_line(line) for line in reversed(lines) if line["step"] <= step), zero_reading())
        known = self._read()
        if known:
            earlier = zero_reading() | known["seconds"]
            earlier[DOWN] += max(0.0, time.time() - self.clock.session() - known["at"])
            if known["marked"] and known["marked"][0] == step:
                saved = zero_reading() | known["marked"][1]
                self.clock.marked = step, saved
        self.clock.add(earlier)
        self.clock.lose(saved, earlier)

    def _read(self) -> dict[str, Any] | None:
        try:
            return schema.read(self.path, SHAPE)
        except DataError:  # what is not known of the time counts for nothing
            return None

    def write(self) -> None:
        """Writes it anew; a full disk or a slow one must not end training."""
        content = {"at": time.time(), "seconds": self.clock.reading(), "marked": self.clock.marked}
        temporary = self.path.with_name(f".{self.path.name}")
        with suppress(OSError):
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)


def _of_line(line: Mapping[str, Any]) -> Reading:
    return {kind: line.get(f"time/{kind}") or 0.0 for kind in KINDS}


@contextmanager
def record_clock(clock: Clock, workdir: Path, step: int, writes: bool = True) -> Iterator[None]:
    """Keeps the record of a run while the block runs; the end of a block that ends well is the end of the run.

    Args:
      clock: of this process; gets what earlier ones took.
      workdir: a run's directory, which this process has locked.
      step: at which the run begins or goes on.
      writes: whether this is the one process of the run that does.
    """
    record, done = Record(workdir, clock), threading.Event()
    record.go_on(step)

    if not writes:
        yield
        return

    def keep() -> None:
        while not done.is_set():
            record.write()
            done.wait(SECONDS_BETWEEN_RECORDS)

    thread = threading.Thread(target=keep, name="clock", daemon=True)
    thread.start()
    ended = False
    try:
        yield
        ended = True
    finally:
        done.set()
        thread.join()
        if ended:
            record.path.unlink(missing_ok=True)
        else:
            record.write()
