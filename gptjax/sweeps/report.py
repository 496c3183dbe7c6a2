"""What a sweep shows at its end: results.csv, seeds.csv, plots/, best.py, summary.json, and the same for the eye."""

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

SHOWN = 8  # trials, or settings, in what is printed


def write(folder: Path, search: Search, results: Sequence[Result]) -> dict[str, Any]:
    """Writes all files of a sweep's end; returns what summary.json says.

    Args:
      folder: the sweep's.
      search: what was swept.
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
    """The best trial's config as a recipe."""
    config = spaces.with_values(search.config(), best.values)
    method = f"held-out loss {best.loss:.4f}"
    if outcomes.has_several_seeds(results):
        group = outcomes.groups(results)[0]
        method += f"; over {len(group.losses)} seeds {mean_and_std(group)}"
    recipe_name = search.recipe.replace("\\", "/").replace('"', "'")
    title = f"{recipe_name} with the best of {len(results)} trials of a sweep: {method}."
    return recipe.as_recipe(config, title, best.values)


def mean_and_std(group: outcomes.Group) -> str:
    """The mean loss of a setting, and of several seeds the standard deviation."""
    deviation = "" if group.deviation is None else f" ± {group.deviation:.4f}"
    return f"{group.mean:.4f}{deviation}"


def summarize(folder: Path, best: Result | None, results: Sequence[Result]) -> dict[str, Any]:
    """The sweep's figures by name."""
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
    """Where a trial's run is, unless another worker has it in a directory of its own."""
    workdir = folder / "trials" / result.name
    return {"workdir": str(workdir)} if workdir.is_dir() else {}


def as_text(folder: Path, results: Sequence[Result]) -> str:
    """The best trials, or over seeds the best settings, and where everything is."""
    if outcomes.has_several_seeds(results):
        rows = [
            [*map(format_value, one.values.values()), mean_and_std(one), f"{len(one.losses)} of {len(one.results)}"]
            for one in outcomes.groups(results)
        ]
        names = [*outcomes.groups(results)[0].values, "held-out loss", "seeds done"]
    else:
        rows = [
            [*map(format_value, one.values.values()), "" if one.loss is None else f"{one.loss:.4f}", one.status]
            for one in outcomes.ranked(results)
        ]
        names = [*results[0].values, "held-out loss", ""]
    lines = aligned([names, *rows[:SHOWN]])
    lines += [f"... {len(rows) - SHOWN} more in results.csv"] if len(rows) > SHOWN else []
    counts = Counter(one.status for one in results)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    best, files = outcomes.best(results), ["results.csv", "summary.json", "plots/", "trials/"]
    lines += ["", f"trials          {told}"]
    if outcomes.has_several_seeds(results):
        files.insert(1, "seeds.csv")
    if best:
        files.insert(1, "best.py")
        lines += [f"best            {describe_best(best, results)}"]
    lines += [f"files           {folder}/ {' '.join(files)}"]
    lines += [f"go on with      python -m gptjax.train --config={shlex.quote(str(folder / 'best.py'))}"] if best else []
    return "\n".join(lines)


def describe_best(best: Result, results: Sequence[Result]) -> str:
    """The trial, or of several seeds the setting, whose config best.py has."""
    if not outcomes.has_several_seeds(results):
        return f"{format_values(best.values)}: held-out loss {best.loss:.4f}"
    group = outcomes.groups(results)[0]
    where = f"{format_values(group.values)}: " if group.values else ""
    loss = f"held-out loss {mean_and_std(group)} over {len(group.losses)} seeds"
    return f"{where}{loss}; best.py has seed {best.values['seed']}"
