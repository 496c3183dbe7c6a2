"""Report of a sweep: results.csv, seeds.csv, plots/, best.py and summary.json, and a summary as text."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.core.console import aligned
from gptjax.core.files import write_atomic
from gptjax.sweeps import plots, recipe
from gptjax.sweeps import results as outcomes
from gptjax.sweeps import space as spaces
from gptjax.sweeps.results import Result
from gptjax.sweeps.trials import Search
from gptjax.sweeps.watch import format_value, format_values

SHOWN = 8  # number of trials, or settings, in the text


def write(folder: Path, search: Search, results: Sequence[Result]) -> dict[str, Any]:
    """Writes all files of the report; returns the content of summary.json.

    Args:
      folder: of the sweep.
      search: of the sweep.
      results: at least one.
    """
    outcomes.write_csv(folder, results)
    plots.write(folder / "plots", search.space, results)
    best = outcomes.best(results)
    if best:
        write_atomic(folder / "best.py", best_recipe(search, best, results))
    summary = summarize(folder, best, results)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def best_recipe(search: Search, best: Result, results: Sequence[Result]) -> str:
    """Formats the config of the best trial as a recipe."""
    config = spaces.with_values(search.config(), best.values)
    quality = f"held-out loss {best.loss:.4f}"
    if outcomes.has_several_seeds(results):
        group = outcomes.groups(results)[0]
        quality += f"; over {len(group.losses)} seeds {mean_and_std(group)}"
    recipe_name = search.recipe.replace("\\", "/").replace('"', "'")
    title = f"{recipe_name} with the best of {len(results)} trials of a sweep: {quality}."
    return recipe.as_recipe(config, title, best.values)


def mean_and_std(group: outcomes.Group) -> str:
    """Formats the mean loss of a setting, with the standard deviation over several seeds."""
    deviation = "" if group.deviation is None else f" ± {group.deviation:.4f}"
    return f"{group.mean:.4f}{deviation}"


def summarize(folder: Path, best: Result | None, results: Sequence[Result]) -> dict[str, Any]:
    """Collects the results of a sweep by name."""
    summary: dict[str, Any] = {
        "trials": len(results),
        "by_status": dict(Counter(one.status for one in results)),
        "seconds": round(sum(one.seconds for one in results), 3),
        "best": outcomes.as_object(best) | workdir_of_trial(folder, best) if best else None,
    }
    if outcomes.has_several_seeds(results):
        summary["settings"] = [
            {
                "values": one.values,
                "mean_loss": one.mean if math.isfinite(one.mean) else None,
                "deviation": one.deviation,
                "done": len(one.losses),
                "seeds": len(one.results),
            }
            for one in outcomes.groups(results)
        ]
    return summary


def workdir_of_trial(folder: Path, result: Result) -> dict[str, str]:
    """Returns {"workdir": directory of the trial's run}, or {} if another worker has it."""
    workdir = folder / "trials" / result.name
    return {"workdir": str(workdir)} if workdir.is_dir() else {}


def as_text(folder: Path, results: Sequence[Result]) -> str:
    """Formats the best trials, or with several seeds the best settings, and lists the files."""
    if outcomes.has_several_seeds(results):
        rows = [
            [*map(format_value, one.values.values()), mean_and_std(one), f"{len(one.losses)} of {len(one.results)}"]
            for one in outcomes.groups(results)
        ]
        names = [*outcomes.groups(results)[0].values, "held-out loss", "seeds done"]
    else:
        rows = [
            [*map(format_value, one.values.values()), "" if one.loss is None else f"{one.loss:.4f}", one.status]
            for one in outcomes.sort_results(results)
        ]
        names = [*results[0].values, "held-out loss", ""]
    lines = aligned([names, *rows[:SHOWN]])
    lines += [f"... {len(rows) - SHOWN} more in results.csv"] if len(rows) > SHOWN else []
    counts = Counter(one.status for one in results)
    status_counts = ", ".join(f"{count} {status}" for status, count in counts.items())
    best, files = outcomes.best(results), ["results.csv", "summary.json", "plots/", "trials/"]
    lines += ["", f"trials          {status_counts}"]
    if outcomes.has_several_seeds(results):
        files.insert(1, "seeds.csv")
    if best:
        files.insert(1, "best.py")
        lines += [f"best            {describe_best(best, results)}"]
    lines += [f"files           {folder}/ {' '.join(files)}"]
    lines += [f"next            python -m gptjax.train --config={shlex.quote(str(folder / 'best.py'))}"] if best else []
    return "\n".join(lines)


def describe_best(best: Result, results: Sequence[Result]) -> str:
    """Describes the trial, or with several seeds the setting, whose config is in best.py."""
    if not outcomes.has_several_seeds(results):
        return f"{format_values(best.values)}: held-out loss {best.loss:.4f}"
    group = outcomes.groups(results)[0]
    setting = f"{format_values(group.values)}: " if group.values else ""
    loss = f"held-out loss {mean_and_std(group)} over {len(group.losses)} seeds"
    return f"{setting}{loss}; best.py has seed {best.values['seed']}"
