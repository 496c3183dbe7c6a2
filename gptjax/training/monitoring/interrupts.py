"""Signals that ask a run to end: noted while it takes steps, so that the step in hand is finished and saved.

Decides when to leave and with which signal's number; saving is the loop's, the exit code gptjax.core.arguments's.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
from jax.experimental import multihost_utils

from gptjax.config.errors import Interrupted
from gptjax.core import console

StopSignal = Callable[[int], int | None]


@contextmanager
def handle_signals() -> Iterator[StopSignal]:
    """While the block runs SIGTERM and SIGINT are noted, and the second one ends the process at once.

    Yields `asked(step)`, to be called after every step: the number of the signal to leave for after this step, or None.

    Raises:
      Interrupted: at the end of a block that was not left for a signal that came.
    """
    several = jax.process_count() > 1
    seen: list[int] = []

    def note(number: int) -> None:
        seen.append(number)
        if len(seen) > 1:
            exit_immediately(number)
        console.say(f"{signal.Signals(number).name}    stopping after this step; again to quit at once")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other processes of

    # Of several processes SIGTERM is JAX's: its handler is no handler of Python's, and this one would replace it.
    with listen_for_signals((signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT), note):
        yield partial(agree_on_signal, seen)
    if seen and not several:
        raise Interrupted(seen[0])


def agree_on_signal(seen: Sequence[int], step: int) -> int | None:
    """The signal to leave for after a step; of several processes all leave after the same one.

    Args:
      seen: signals that this process got.
      step: every process calls this after every step.
    """
    if jax.process_count() > 1 and not multihost_utils.reached_preemption_sync_point(step):
        return None
    if seen:
        return seen[0]
    return signal.SIGTERM if jax.process_count() > 1 else None


def exit_immediately(number: int) -> None:
    """Ends the process; what is being written stays under its temporary name."""
    os.write(2, b"gptjax: quit at once; what was saved is whole, and the same command goes on there\n")
    os._exit(128 + number)


@contextmanager
def listen_for_signals(signals: Sequence[int], note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note(number)` for each of the signals that comes during the block, in a thread.

    A handler of Python's runs between two operations of the main thread, which may wait in C for a compiler or a
    device; the thread hears of a signal at once. Does nothing where the main thread is another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        while number := os.read(reading, 1):
            if number[0] in signals:
                note(number[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writing)
    handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        thread.join()
        os.close(reading)
