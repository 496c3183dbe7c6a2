"""What a person watching a sweep sees: a live table with the best so far; plain lines where there is no terminal."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gptjax.core import console
from gptjax.sweeps.results import DONE, Result, ranked
from gptjax.sweeps.trials import Trial

SHOWN = 10  # finished trials in the table


class Watch:
    """Is told of each trial as it begins, goes on and ends.

    Args:
      total: trials in all, those that were finished before included.
      say: prints a line.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.results: list[Result] = []
        self.trial: Trial | None = None
        self.now: dict[str, Any] = {}

    def known(self, results: Sequence[Result]) -> None:
        """Trials were finished before."""
        self.results += results
        if results:
            self.say(f"finished before: {len(results)} of {self.total} trials")

    def begin(self, trial: Trial) -> None:
        """A trial begins."""
        self.trial, self.now = trial, {}
        self.show()

    def line(self, trial: Trial, line: dict[str, Any]) -> None:
        """A line of its metrics came."""
        self.now.update(line)
        self.show()

    def end(self, result: Result) -> None:
        """A trial is finished."""
        self.results.append(result)
        self.trial = None
        self.show()

    def show(self) -> None:
        """Draws what there is to see now."""


class Lines(Watch):
    """A line as a trial begins and ends, and one every few seconds between."""

    last = 0.0

    def begin(self, trial: Trial) -> None:
        """A trial begins."""
        self.last = time.monotonic()
        self.say(f"[{len(self.results) + 1}/{self.total}] {words(trial.values)}  begins")
        super().begin(trial)

    def show(self) -> None:
        """Tells how far the trial is, now and then."""
        if self.trial and self.now and time.monotonic() - self.last >= console.SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.say(f"[{len(self.results) + 1}/{self.total}] {words(self.trial.values)}  {progress(self)}")

    def end(self, result: Result) -> None:
        """A trial is finished."""
        super().end(result)
        best = ranked(self.results)[0]
        so_far = f"; best so far {best.loss:.4f}: {words(best.values)}" if best.status == DONE else ""
        self.say(f"[{len(self.results)}/{self.total}] {words(result.values)}  {outcome(result)}{so_far}")


class Table(Watch):
    """A table that is drawn again and again.

    Args:
      live: of rich.
    """

    def __init__(self, total: int, say: Callable[[str], None], live: Any) -> None:
        super().__init__(total, say)
        self.live = live

    def show(self) -> None:
        """Draws the best trials so far and the one that is being trained."""
        self.live.update(drawn(self))


@contextmanager
def watching(total: int) -> Iterator[Watch]:
    """A watch for the block: a table on a terminal, else lines."""
    if not console.is_interactive():
        with console.quiet() as say:
            yield Lines(total, say)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield Table(total, console.say, live)


def drawn(watch: Watch) -> Any:
    """The table, as rich draws it."""
    from rich.table import Table as Drawn

    keys = list(dict.fromkeys(key for one in (*watch.results, watch.trial) if one for key in one.values))
    title = f"{len(watch.results)} of {watch.total} trials"
    table = Drawn("", *(key.rsplit(".", 1)[-1] for key in keys), "held-out loss", "", title=title)
    order = ranked(watch.results)
    for place, one in enumerate(order[:SHOWN]):
        best = place == 0 and one.status == DONE
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        cells = [str(place + 1), *(shown(one.values.get(key)) for key in keys), loss, "best so far" * best]
        cells[-1] = cells[-1] or ("" if one.status == DONE else one.status)
        table.add_row(*cells, style="bold green" if best else None)
    if len(order) > SHOWN:
        table.add_row("...", *[""] * len(keys), "", f"{len(order) - SHOWN} more")
    if watch.trial:
        looked = watch.now.get("val/loss")
        cells = [*(shown(watch.trial.values.get(key)) for key in keys), "" if looked is None else f"{looked:.4f}"]
        table.add_section()
        table.add_row("now", *cells, progress(watch), style="cyan")
    return table


def progress(watch: Watch) -> str:
    """How far the trial is that is being trained."""
    if not watch.now or not watch.trial:
        return "starting"
    loss = watch.now.get("train/loss")
    facts = [f"step {watch.now['step']:,}/{watch.trial.config.train.steps:,}"]
    facts += [] if loss is None else [f"loss {loss:.3f}"]
    return "  ".join(facts)


def outcome(result: Result) -> str:
    """What became of a trial, in words."""
    if result.status == DONE:
        return f"held-out loss {result.loss:.4f}"
    at = f" at step {result.steps:,}" if result.steps else ""
    loss = "" if result.loss is None else f", held-out loss {result.loss:.4f}"
    return f"{result.status}{at}{loss}" + (f" ({result.note})" if result.note else "")


def words(values: dict[str, Any]) -> str:
    """learning_rate=0.001 seed=0"""
    return " ".join(f"{key.rsplit('.', 1)[-1]}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """A value to read."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
