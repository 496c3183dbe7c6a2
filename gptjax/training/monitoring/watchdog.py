"""Ends a process that makes no progress, so that a scheduler starts it again. Knows nothing of what progress is."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STDERR = 2  # itself, whatever sys.stderr is
SECONDS_TO_WRITE = 10.0


@contextmanager
def watch_progress(minutes: float, copy: Path, doing: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yields `beat()`, to be called at each sign of progress; without one for so long the process ends.

    It writes the stacks of all threads and leaves with code 1. A thread looks after that; should it not get to run,
    because something holds Python's lock, faulthandler's timer does, which it keeps putting off. A process that was
    stopped (SIGSTOP) for longer ends when it goes on.

    Args:
      minutes: 0 for never.
      copy: file that gets the stacks, besides stderr.
      doing: what the process is at, for the message.
    """
    if not minutes:
        yield lambda: None
        return
    limit = 60 * minutes
    last, done = time.monotonic(), threading.Event()

    def beat() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not done.is_set():
            faulthandler.dump_traceback_later(limit, exit=True, file=STDERR)
            done.wait(min(limit / 10, 10.0))
            if time.monotonic() - last > limit:
                abort(f"no progress for {minutes:g} minutes (train.hang_minutes), at {doing()}", copy)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        done.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def abort(what: str, copy: Path) -> NoReturn:
    """Writes what happened and the stacks of all threads to stderr and to a file, and leaves with code 1."""
    faulthandler.dump_traceback_later(SECONDS_TO_WRITE, exit=True, file=STDERR)  # the disk itself may hang
    message = f"gptjax: {what}; the stacks are in {copy}; the same command goes on at the newest checkpoint\n"
    os.write(STDERR, message.encode())
    faulthandler.dump_traceback(file=STDERR)
    try:
        with open(copy, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
            file.flush()
            faulthandler.dump_traceback(file=file)
    finally:
        os._exit(1)
