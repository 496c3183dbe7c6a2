"""Traces of selected steps of a run, for TensorBoard's profiler (xprof) and for Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import jax

from gptjax.core import console

Pause = Callable[[], AbstractContextManager[None]]


@contextmanager
def trace_steps(
    steps: tuple[int, ...], folder: Path, pause: Pause
) -> Iterator[Callable[[int], AbstractContextManager]]:
    """Yields `traced(step)`, a context manager for each step of a run; the selected steps are traced.

    Each trace is written to a subfolder of `folder` named by the time, and includes evaluations and checkpoints between
    its steps. Leaving the block ends a trace that is active. A run that resumes within the range traces the rest of it.

    Args:
      steps: `config.log.profile_steps`: the first and the last traced step, counted from 1, or empty.
      folder: for traces.
      pause: a context manager that waits for the previous steps and excludes the block from the run's rates.
    """
    first, last = steps or (0, -1)
    active: list[int] = []  # the steps traced so far

    def end() -> None:
        steps_traced = list(active)
        active.clear()  # first, so that an interruption does not end it again
        stop(folder, steps_traced)

    def traced(step: int) -> AbstractContextManager:
        is_selected = first <= step <= last
        if is_selected and not active:
            with pause():
                start(folder)
        elif active and not is_selected:
            with pause():
                end()
        if not is_selected:
            return nullcontext()
        active.append(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    try:
        yield traced
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


def stop(folder: Path, steps: list[int]) -> None:
    """Stops the trace, writes it, and logs where it is and how to open it."""
    jax.profiler.stop_trace()
    newest = max((folder / "plugins" / "profile").iterdir())
    console.say(
        f"profile    of steps {steps[0]:,} to {steps[-1]:,}: `pip install xprof && xprof --logdir={folder}`, or open "
        f"{newest / 'perfetto_trace.json.gz'} at https://ui.perfetto.dev"
    )
