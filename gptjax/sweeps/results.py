"""Results of trials: saved as files, ranked, grouped over seeds, and written as tables."""

import ast
import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.errors import DataError
from gptjax.core import schema
from gptjax.core.files import write_atomic
from gptjax.sweeps.space import Values

DONE, DIVERGED, PRUNED, IMPOSSIBLE = "done", "diverged", "pruned", "impossible"
SEED = "seed"
FACTS = ("status", "loss", "steps", "seconds", "tokens_per_second", "note")  # columns of results.csv after the keys


class Result(NamedTuple):
    """The result of a trial.

    Attributes:
      name: of its directory in trials/.
      values: of the swept keys.
      status: done, diverged, pruned (stopped early, because others were better), or impossible (an invalid config).
      loss: of all held-out text, nats per token; pruned: of the sample at the last evaluation; otherwise None.
      steps: number of steps taken.
      seconds: of training, over all processes.
      tokens_per_second: median; None if unknown.
      note: the reason why it is impossible or has diverged.
    """

    name: str
    values: Values
    status: str
    loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    note: str = ""


RESULT = {"status": str, "loss": (float, None), "steps": int, "seconds": float, "tokens_per_second": (float, None)}
RESULT |= {"values": {}, "note": str}  # schema of the file of a result


class Group(NamedTuple):
    """Trials that differ only in their seed.

    Attributes:
      values: of the other swept keys.
      results: one per seed.
    """

    values: Values
    results: list[Result]

    @property
    def losses(self) -> list[float]:
        """Losses of the finished trials."""
        return [one.loss for one in self.results if one.status == DONE and one.loss is not None]

    @property
    def mean(self) -> float:
        """Mean loss; infinite if the trial of any seed did not finish, so that the setting is not chosen."""
        return statistics.fmean(self.losses) if len(self.losses) == len(self.results) else math.inf

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the losses; None for fewer than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


def save_result(folder: Path, result: Result) -> None:
    """Saves the result of a trial, so that it is not repeated."""
    (folder / "outcomes").mkdir(exist_ok=True)
    write_atomic(folder / "outcomes" / f"{result.name}.json", json.dumps(result._asdict(), indent=2) + "\n")


def load_result(folder: Path, name: str, values: Values) -> Result | None:
    """Loads the result of a trial; None if it is not finished or the file is damaged; the trial is then repeated."""
    try:
        content = schema.read(folder / "outcomes" / f"{name}.json", RESULT)
    except DataError:
        return None
    return Result(**{field: content[field] for field in Result._fields} | {"name": name, "values": values})


def sort_results(results: Sequence[Result]) -> list[Result]:
    """Sorts results: finished trials by loss, then the others."""
    return sorted(results, key=lambda one: (one.status != DONE, math.inf if one.loss is None else one.loss))


def groups(results: Sequence[Result]) -> list[Group]:
    """Groups trials that differ only in their seed; lowest mean loss first."""
    by_values: dict[str, Group] = {}
    for one in results:
        values = {key: value for key, value in one.values.items() if key != SEED}
        by_values.setdefault(json.dumps(values), Group(values, [])).results.append(one)
    return sorted(by_values.values(), key=lambda group: group.mean)


def has_several_seeds(results: Sequence[Result]) -> bool:
    """Returns True if any setting was tried with several seeds."""
    return any(len(group.results) > 1 for group in groups(results))


def best(results: Sequence[Result]) -> Result | None:
    """Returns the trial with the lowest loss; with several seeds, the first trial of the setting with the lowest mean.

    Returns None if no trial is done.
    """
    group = groups(results)[0] if results else None
    if group is not None and math.isfinite(group.mean) and has_several_seeds(results):
        return group.results[0]
    first = sort_results(results)[:1]
    return first[0] if first and first[0].status == DONE else None


def as_object(result: Result) -> dict[str, Any]:
    """Formats a result for --json."""
    return {"trial": result.name, **{key: value for key, value in result._asdict().items() if key != "name"}}


def write_csv(folder: Path, results: Sequence[Result]) -> None:
    """Writes results.csv, with a line per trial, best first, and with several seeds seeds.csv."""
    keys = list(dict.fromkeys(key for one in results for key in one.values))
    rows = [
        {"trial": one.name, **one.values, **{fact: getattr(one, fact) for fact in FACTS}}
        for one in sort_results(results)
    ]
    write_atomic(folder / "results.csv", table(["trial", *keys, *FACTS], rows))
    if has_several_seeds(results):
        seed_rows = [
            {**one.values, "mean_loss": one.mean, "deviation": one.deviation, "done": len(one.losses)}
            | {"seeds": len(one.results), "losses": " ".join(map(str, one.losses))}
            for one in groups(results)
        ]
        other = [key for key in keys if key != SEED]
        facts = ["mean_loss", "deviation", "done", "seeds", "losses"]
        write_atomic(folder / "seeds.csv", table([*other, *facts], seed_rows))


def read_csv(folder: Path) -> list[Result]:
    """Reads the results of a finished sweep, best first.

    Raises:
      DataError: there is no finished sweep.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise DataError(f"{folder} has no results.csv: give a sweep's directory, and let the sweep end")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [_read_row(row) for row in rows]


def _read_row(row: dict[str, str]) -> Result:
    facts: dict[str, Any] = {fact: None if row[fact] == "" else _value(row[fact]) for fact in FACTS}
    values = {key: _value(text) for key, text in row.items() if key not in ("trial", *FACTS)}
    return Result(row["trial"], values, **facts | {"status": row["status"], "note": row["note"]})


def _value(text: str) -> Any:
    """Parses a cell as a Python literal; otherwise returns the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows as comma-separated values; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
