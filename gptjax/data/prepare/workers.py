"""Worker processes that map chunks to results in order, with a bounded number in flight."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


class Workers:
    """Pool of worker processes, as a context manager; a pool of one runs everything in this process.

    Args:
      count: number of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._first: tuple[Any, ...] = ()

    def begin(self, *first: Any) -> None:
        """Sets the first arguments of every call of `map`."""
        self._first = first

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Iterates over `function(*first, *call_arguments)` in order."""
        if self.count == 1:
            for call_arguments in arguments:
                yield function(*self._first, *call_arguments)
            return
        if self._pool is None:
            # No fork: a process that has imported jax has threads, which do not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_start_worker)
        waiting: deque[Future[Any]] = deque()
        for call_arguments in arguments:
            waiting.append(self._pool.submit(function, *self._first, *call_arguments))
            if len(waiting) > 2 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ignores interrupts, which the parent process handles, and exits when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
