"""Wall time of a run by kind, each second counted once, over all processes that worked on it.

A run writes its clock to clock.json while it trains, so that the time of a process that was killed is counted too.
Imports nothing heavy.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptjax.config.errors import DataError
from gptjax.core import schema
from gptjax.runs.writers import read_metrics

ALIVE = {
    "start": "imports, reading the data, restoring",
    "compile": "of the train step",
    "step": "dispatching steps and waiting for them",
    "data": "waiting for a batch",
    "eval": "on held-out text, its compilation included",
    "save": "copying checkpoints, and waiting for those being written",
    "profile": "beginning and writing traces",
    "finish": "samples, plot and summary, after the last step",
    "lost": "work after the checkpoint that the run resumed from, which is repeated",
}
DOWN = "down"  # between the end of a process and the start of the next
KINDS = (*ALIVE, DOWN)
SECONDS_BETWEEN_RECORDS = 1.0
SHAPE = {"at": float, "seconds": {str: float}, "marked": (schema.Row(int, {str: float}), None)}  # of clock.json

Reading = dict[str, float]  # seconds by kind


def zero_reading() -> Reading:
    """A reading of 0 seconds of each kind."""
    return dict.fromkeys(KINDS, 0.0)


def total(reading: Mapping[str, float]) -> float:
    """Seconds during which a process worked on the run."""
    return sum(reading[kind] for kind in ALIVE)


def goodput(reading: Mapping[str, float]) -> float:
    """Fraction of the total time spent in train steps, 0 to 1."""
    return reading["step"] / total(reading)


def as_metrics(reading: Mapping[str, float]) -> dict[str, float]:
    """Returns {"seconds": ..., "time/start": ..., ...}, rounded to milliseconds."""
    return {"seconds": round(total(reading), 3)} | {f"time/{kind}": round(reading[kind], 3) for kind in KINDS}


class Clock:
    """Counts seconds by kind; exactly one kind is counting at any time.

    Args:
      started: time.monotonic() when the process started.
    """

    def __init__(self, started: float) -> None:
        self.started = self._since = started
        self.kind = "start"
        self.marked: tuple[int, Reading] | None = None
        self._seconds = zero_reading()
        self._lock = threading.Lock()

    def begin(self, kind: str) -> str:
        """Starts to count another kind; returns the previous one."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self.kind] += now - self._since
            before, self.kind, self._since = self.kind, kind, now
        return before

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as this kind, except that of nested blocks."""
        before = self.begin(kind)
        try:
            yield
        finally:
            self.begin(before)

    def reading(self) -> Reading:
        """Returns the seconds by kind until now."""
        self.begin(self.kind)
        return dict(self._seconds)

    def session(self) -> float:
        """Returns the seconds since this process started."""
        return time.monotonic() - self.started

    def mark(self, step: int) -> None:
        """Stores the reading at which a step was saved."""
        self.marked = step, self.reading()

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the seconds of earlier processes."""
        with self._lock:
            self._seconds = {kind: self._seconds[kind] + earlier[kind] for kind in KINDS}

    def lose(self, since: Mapping[str, float], until: Mapping[str, float]) -> None:
        """Counts the time between two readings, which is repeated, as lost."""
        with self._lock:
            for kind in ALIVE:
                passed = until[kind] - since[kind]
                self._seconds[kind] -= passed
                self._seconds["lost"] += passed


class Record:
    """File clock.json of a run, about a second behind its clock.

    Args:
      workdir: a run's directory.
      clock: of this process.
    """

    def __init__(self, workdir: Path, clock: Clock) -> None:
        self.path, self.workdir, self.clock = workdir / "clock.json", workdir, clock

    def resume(self, step: int) -> None:
        """Adds the time of earlier processes to the clock: lost after this step, down while no process ran."""
        lines = read_metrics(self.workdir)
        earlier = max(map(_of_line, lines), key=total, default=zero_reading())
        saved = next((_of_line(line) for line in reversed(lines) if line["step"] <= step), zero_reading())
        record = self._read()
        if record:
            earlier = zero_reading() | record["seconds"]
            earlier[DOWN] += max(0.0, time.time() - self.clock.session() - record["at"])
            if record["marked"] and record["marked"][0] == step:
                saved = zero_reading() | record["marked"][1]
                self.clock.marked = step, saved
        self.clock.add(earlier)
        self.clock.lose(saved, earlier)

    def _read(self) -> dict[str, Any] | None:
        try:
            return schema.read(self.path, SHAPE)
        except DataError:  # unknown time is not counted
            return None

    def write(self) -> None:
        """Writes the file again; a disk that is full or slow must not end training."""
        content = {"at": time.time(), "seconds": self.clock.reading(), "marked": self.clock.marked}
        temporary = self.path.with_name(f".{self.path.name}")
        with suppress(OSError):
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)


def _of_line(line: Mapping[str, Any]) -> Reading:
    return {kind: line.get(f"time/{kind}") or 0.0 for kind in KINDS}


@contextmanager
def record_clock(clock: Clock, workdirs: Sequence[Path], step: int, writes: bool = True) -> Iterator[None]:
    """Writes clock.json every second while the block runs, and deletes it if the block ends without an exception.

    Args:
      clock: of this process; the time of earlier processes is added to it.
      workdirs: directories of the runs that are trained together, locked by this process.
      step: at which the runs start or resume.
      writes: True in the one process of the runs that writes.
    """
    records, done = [Record(workdir, clock) for workdir in workdirs], threading.Event()
    records[0].resume(step)

    if not writes:
        yield
        return

    def write() -> None:
        for record in records:
            record.write()

    def write_regularly() -> None:
        while not done.is_set():
            write()
            done.wait(SECONDS_BETWEEN_RECORDS)

    thread = threading.Thread(target=write_regularly, name="clock", daemon=True)
    thread.start()
    ended = False
    try:
        yield
        ended = True
    finally:
        done.set()
        thread.join()
        if ended:
            for record in records:
                record.path.unlink(missing_ok=True)
        else:
            write()
