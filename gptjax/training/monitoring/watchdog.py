"""Watchdog: ends a process that makes no progress, so that a scheduler can restart it."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STDERR = 2  # the file descriptor, whatever sys.stderr is
SECONDS_TO_WRITE = 10.0


@contextmanager
def watch_progress(minutes: float, copy: Path, doing: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yields `beat()`, to be called at each sign of progress; without any for `minutes` the process ends.

    It writes the stacks of all threads and exits with code 1. A thread checks the time. If it cannot run, because
    something holds the GIL, the timer of faulthandler fires, which the thread keeps postponing. A process that was
    stopped (SIGSTOP) for longer ends when it continues.

    Args:
      minutes: 0: never.
      copy: file for the stacks, in addition to stderr.
      doing: returns the current activity, for the message.
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
    """Writes the reason and the stacks of all threads to stderr and to a file, and exits with code 1."""
    faulthandler.dump_traceback_later(SECONDS_TO_WRITE, exit=True, file=STDERR)  # the disk itself may hang
    message = f"gptjax: {what}; the stacks are in {copy}; the same command resumes from the newest checkpoint\n"
    os.write(STDERR, message.encode())
    faulthandler.dump_traceback(file=STDERR)
    try:
        with open(copy, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
            file.flush()
            faulthandler.dump_traceback(file=file)
    finally:
        os._exit(1)
