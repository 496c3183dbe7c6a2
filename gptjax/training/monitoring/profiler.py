"""A trace of some steps of a run, for TensorBoard's profiler (xprof) and for Perfetto."""

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
    """Yields `traced(step)`, a context for each step of a run; those that `steps` asks for are traced.

    A trace goes to a folder of its own below `folder`, named by the time. Evaluations and checkpoints that fall between
    its steps are in it. Leaving the block, in whatever way, ends a trace that is under way. A run that goes on in the
    middle of the range traces the rest of it; one that goes on behind it traces nothing.

    Args:
      steps: `config.log.profile_steps`: the first and the last traced step, counted from 1, or nothing.
      folder: where traces go.
      pause: its context waits for the steps before, and keeps what happens inside out of the run's rates.
    """
    first, last = steps or (0, -1)
    under_way: list[int] = []  # the steps traced so far

    def end() -> None:
        ended = list(under_way)
        under_way.clear()  # first, so that nobody who interrupts this ends it again
        stop(folder, ended)

    def traced(step: int) -> AbstractContextManager:
        wanted = first <= step <= last
        if wanted and not under_way:
            with pause():
                start(folder)
        elif under_way and not wanted:
            with pause():
                end()
        if not wanted:
            return nullcontext()
        under_way.append(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    try:
        yield traced
    finally:
        if under_way:
            end()


def options() -> jax.profiler.ProfileOptions:
    """What is recorded: XLA's and the runtime's events. Python's calls are not, which would slow the steps down."""
    chosen = jax.profiler.ProfileOptions()
    chosen.python_tracer_level = 0
    return chosen


def start(folder: Path) -> None:
    """Begins a trace."""
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options())


def stop(folder: Path, steps: list[int]) -> None:
    """Ends the trace, writes it, and says where it is and how to open it."""
    jax.profiler.stop_trace()
    newest = max((folder / "plugins" / "profile").iterdir())
    console.say(
        f"profile    of steps {steps[0]:,} to {steps[-1]:,}: `pip install xprof && xprof --logdir={folder}`, or open "
        f"{newest / 'perfetto_trace.json.gz'} at https://ui.perfetto.dev"
    )
