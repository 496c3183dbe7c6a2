"""Worker processes that take chunks and give results in order, no more ahead than memory allows."""

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
    """So many processes; with one, everything runs in this process. A context: leaving it ends them.

    Args:
      count: processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._first: tuple[Any, ...] = ()

    def begin(self, *first: Any) -> None:
        """Sets what every call of `map` gets before its own arguments."""
        self._first = first

    def map(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*first, *each)` for each, in order."""
        if self.count == 1:
            for call_arguments in arguments:
                yield function(*self._first, *call_arguments)
            return
        if self._pool is None:
            # Not by fork: a process that has imported jax has threads, which do not survive one.
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
    """A worker leaves interrupts to the process that started it, and ends when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
