"""Handling of SIGTERM and SIGINT during training: the current step is finished and saved before the process exits.

Decides when to exit and for which signal; the loop saves, and gptjax.core.arguments sets the exit code.
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
    """Records SIGTERM and SIGINT while the block runs; a second signal ends the process immediately.

    Yields `stop_signal(step)`, to be called after every step; it returns the number of the signal to exit for after
    this step, or None.

    Raises:
      Interrupted: at the end of the block, if a signal came and the block did not exit for it.
    """
    several = jax.process_count() > 1
    seen: list[int] = []

    def note(number: int) -> None:
        seen.append(number)
        if len(seen) > 1:
            exit_immediately(number)
        console.say(f"{signal.Signals(number).name}    stopping after this step; again to quit immediately")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX notifies the other processes

    # With several processes JAX handles SIGTERM with a handler that is not Python's; this one would replace it.
    with listen_for_signals((signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT), note):
        yield partial(agree_on_signal, seen)
    if seen and not several:
        raise Interrupted(seen[0])


def agree_on_signal(seen: Sequence[int], step: int) -> int | None:
    """Returns the signal to exit for after a step, or None; with several processes all exit after the same step.

    Args:
      seen: signals that this process received.
      step: the current step; every process calls this after every step.
    """
    if jax.process_count() > 1 and not multihost_utils.reached_preemption_sync_point(step):
        return None
    if seen:
        return seen[0]
    return signal.SIGTERM if jax.process_count() > 1 else None


def exit_immediately(number: int) -> None:
    """Ends the process; files that are being written keep their temporary names."""
    os.write(2, b"gptjax: quit immediately; saved checkpoints are complete, and the same command resumes training\n")
    os._exit(128 + number)


@contextmanager
def listen_for_signals(signals: Sequence[int], note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note(number)` in a thread for each of these signals that arrives during the block.

    A Python handler runs between two operations of the main thread, which may wait in C for a compiler or a device; the
    thread receives a signal immediately. Does nothing outside the main thread.
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
