"""Progress of a sweep: a live table with the best trials so far on a terminal, otherwise plain lines."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gptjax.core import console
from gptjax.sweeps.results import DONE, Result, sort_results
from gptjax.sweeps.trials import Trial

SHOWN = 10  # number of finished trials in the table


class Watch:
    """Receives the start, the metrics and the end of each trial.

    Args:
      total: number of trials, including those finished before.
      say: prints a line.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.results: list[Result] = []
        self.trial: Trial | None = None
        self.now: dict[str, Any] = {}

    def add_finished(self, results: Sequence[Result]) -> None:
        """Adds the results of trials that were finished before."""
        self.results += results
        if results:
            self.say(f"finished before: {len(results)} of {self.total} trials")

    def begin(self, trial: Trial) -> None:
        """Called when a trial starts."""
        self.trial, self.now = trial, {}
        self.show()

    def line(self, trial: Trial, line: dict[str, Any]) -> None:
        """Called with a line of metrics of a trial."""
        self.now.update(line)
        self.show()

    def end(self, result: Result) -> None:
        """Called with the result of a trial."""
        self.results.append(result)
        self.trial = None
        self.show()

    def show(self) -> None:
        """Updates the display."""


class Lines(Watch):
    """Prints a line when a trial starts and ends, and one every few seconds in between."""

    last = 0.0

    def begin(self, trial: Trial) -> None:
        """Called when a trial starts."""
        self.last = time.monotonic()
        self.say(f"[{len(self.results) + 1}/{self.total}] {format_values(trial.values)}  starts")
        super().begin(trial)

    def show(self) -> None:
        """Prints the progress of the trial every few seconds."""
        if self.trial and self.now and time.monotonic() - self.last >= console.SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.say(
                f"[{len(self.results) + 1}/{self.total}] {format_values(self.trial.values)}  {format_progress(self)}"
            )

    def end(self, result: Result) -> None:
        """Called with the result of a trial."""
        super().end(result)
        best = sort_results(self.results)[0]
        suffix = f"; best so far {best.loss:.4f}: {format_values(best.values)}" if best.status == DONE else ""
        self.say(f"[{len(self.results)}/{self.total}] {format_values(result.values)}  {format_result(result)}{suffix}")


class Table(Watch):
    """Updates a live table.

    Args:
      live: a rich.live.Live.
    """

    def __init__(self, total: int, say: Callable[[str], None], live: Any) -> None:
        super().__init__(total, say)
        self.live = live

    def show(self) -> None:
        """Shows the best trials so far and the current one."""
        self.live.update(render_table(self))


@contextmanager
def show_progress(total: int) -> Iterator[Watch]:
    """Yields a Watch for the block: a table on a terminal, otherwise lines."""
    if not console.is_interactive():
        with console.quiet() as say:
            yield Lines(total, say)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield Table(total, console.say, live)


def render_table(watch: Watch) -> Any:
    """Renders the table for rich."""
    from rich.table import Table as RichTable

    keys = list(dict.fromkeys(key for one in (*watch.results, watch.trial) if one for key in one.values))
    title = f"{len(watch.results)} of {watch.total} trials"
    table = RichTable("", *(key.rsplit(".", 1)[-1] for key in keys), "held-out loss", "", title=title)
    order = sort_results(watch.results)
    for rank, one in enumerate(order[:SHOWN]):
        best = rank == 0 and one.status == DONE
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        cells = [str(rank + 1), *(format_value(one.values.get(key)) for key in keys), loss, "best so far" * best]
        cells[-1] = cells[-1] or ("" if one.status == DONE else one.status)
        table.add_row(*cells, style="bold green" if best else None)
    if len(order) > SHOWN:
        table.add_row("...", *[""] * len(keys), "", f"{len(order) - SHOWN} more")
    if watch.trial:
        val_loss = watch.now.get("val/loss")
        cells = [
            *(format_value(watch.trial.values.get(key)) for key in keys),
            "" if val_loss is None else f"{val_loss:.4f}",
        ]
        table.add_section()
        table.add_row("now", *cells, format_progress(watch), style="cyan")
    return table


def format_progress(watch: Watch) -> str:
    """Formats the progress of the current trial."""
    if not watch.now or not watch.trial:
        return "starting"
    loss = watch.now.get("train/loss")
    facts = [f"step {watch.now['step']:,}/{watch.trial.config.train.steps:,}"]
    facts += [] if loss is None else [f"loss {loss:.3f}"]
    return "  ".join(facts)


def format_result(result: Result) -> str:
    """Formats the result of a trial."""
    if result.status == DONE:
        return f"held-out loss {result.loss:.4f}"
    at = f" at step {result.steps:,}" if result.steps else ""
    loss = "" if result.loss is None else f", held-out loss {result.loss:.4f}"
    return f"{result.status}{at}{loss}" + (f" ({result.note})" if result.note else "")


def format_values(values: dict[str, Any]) -> str:
    """Formats values such as learning_rate=0.001 seed=0."""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={format_value(value)}" for key, value in values.items())


def format_value(value: Any) -> str:
    """Formats a value."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
