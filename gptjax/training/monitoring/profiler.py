"""Traces of selected steps of a run, for TensorBoard's profiler (xprof) and for Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jax

from gptjax.core import console

Pause = Callable[[], AbstractContextManager[None]]


@contextmanager
def trace_steps(steps: tuple[int, ...], folder: Path, pause: Pause, start_step: int) -> Iterator[Callable[[int], None]]:
    """Yields `after(step)`, to be called after each step of a run, which starts and ends the trace of selected steps.

    Each trace is written to a subfolder of `folder` named by the time, and includes evaluations and checkpoints between
    its steps. Leaving the block ends a trace that is active. A run that resumes within the range traces the rest of it.

    Args:
      steps: `config.log.profile_steps`: the first and the last traced step, counted from 1, or empty.
      folder: for traces.
      pause: a context manager that waits for the previous steps and excludes the block from the run's rates.
      start_step: number of steps taken before the block.
    """
    first, last = steps or (0, -1)
    active: list[int] = []  # the first and the newest traced step

    def end() -> None:
        traced = tuple(active)
        active.clear()  # first, so that an interruption does not end it again
        stop(folder, *traced)

    def after(step: int) -> None:
        if active:
            active[1] = step
            if step >= last:
                with pause():
                    end()
        elif first <= step + 1 <= last:
            with pause():
                start(folder)
            active[:] = [step + 1, step + 1]

    after(start_step)
    try:
        yield after
    finally:
        if active:
            end()


def options() -> jax.profiler.ProfileOptions:
    """Options that record events of XLA and the runtime, but no Python calls, which would slow the steps down."""
    profile_options = jax.profiler.ProfileOptions()
    profile_options.python_tracer_level = 0
    return profile_options


def start(folder: Path) -> None:
    """Starts a trace."""
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options())


def stop(folder: Path, first: int, last: int) -> None:
    """Stops the trace of these steps, writes it, and logs where it is and how to open it."""
    jax.profiler.stop_trace()
    newest = max((folder / "plugins" / "profile").iterdir())
    console.say(
        f"profile    of steps {first:,} to {last:,}: `pip install xprof && xprof --logdir={folder}`, or open "
        f"{newest / 'perfetto_trace.json.gz'} at https://ui.perfetto.dev"
    )
