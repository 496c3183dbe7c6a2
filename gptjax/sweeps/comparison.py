"""Comparison of runs: curves of groups of runs, and tables of their final results and of their differing keys.

Uses the tables and groups of gptjax.sweeps.runs_table; reads and writes no files.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptjax.core.console import Rows, aligned
from gptjax.interpret.figures import colors
from gptjax.sweeps import runs_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(groups: Sequence[runs_table.Group], measure: str) -> "Figure":
    """Plots held-out measures over each axis in its own panel, with a color per group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained", dpi=100)
    panels = figure.subplots(2, 2, sharey=True)
    values = np.concatenate([run.columns[f"val/{measure}"] for group in groups for run in group.runs])
    values = values[~np.isnan(values)]
    for axes, (axis, label) in zip(panels.flat, runs_table.AXES.items(), strict=True):
        for group, color in zip(groups, colors(len(groups)), strict=True):
            for i, run in enumerate(group.runs):
                mask = run.has_measure(measure)
                x, y = run.columns[axis][mask], run.columns[f"val/{measure}"][mask]
                name = f"{group.name} ({len(group.runs)} runs)" if len(group.runs) > 1 else group.name
                axes.plot(x, y, color=color, marker="o", markersize=2.5, linewidth=1, label="" if i else name)
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    least, middle, most = np.min(values), np.median(values), np.max(values)
    panels[0, 0].set_ylim(least - 0.05 * (middle - least), min(most, middle + 3 * (middle - least)) * 1.02)
    for axes in panels[:, 0]:
        axes.set_ylabel(runs_table.MEASURES[measure])
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if max(map(len, names)) < 60 else 1, fontsize=9)
    return figure


def results(groups: Sequence[runs_table.Group], measure: str) -> Rows:
    """A row per group: number of runs, and mean and standard deviation of their final values."""
    rows = [["", "runs", "finished", runs_table.MEASURES[measure], "standard deviation", "tokens", "FLOPs", "minutes"]]
    for group in groups:
        final = runs_table.final_values(group, measure)
        last = {axis: np.median([run.columns[axis][-1] for run in group.runs]) for axis in runs_table.AXES}
        rows.append(
            [
                group.name, str(len(group.runs)), str(len(final)),
                f"{np.mean(final):.4f}" if final else "", f"{np.std(final, ddof=1):.4f}" if len(final) > 1 else "",
                f"{last['tokens']:,.0f}", f"{last['flops']:.2e}", f"{last['seconds'] / 60:.1f}",
            ]
        )  # fmt: skip
    return rows


def settings(groups: Sequence[runs_table.Group]) -> Rows:
    """A row per key in which the configs differ."""
    values_by_key = runs_table.config_differences([group.runs[0] for group in groups])
    return [
        ["key", *(group.name for group in groups)],
        *([key, *map(str, values)] for key, values in values_by_key.items()),
    ]


def tests(groups: Sequence[runs_table.Group], measure: str) -> Rows:
    """A row per pair of groups: Welch's t-test of their final values."""
    rows = [["", "and", "difference of means", "p", ""]]
    for one in runs_table.welch(groups, measure):
        p, verdict = "", "needs two finished runs of each group with different results"
        if one.p is not None:
            p, verdict = f"{one.p:.2g}", "differ" if one.p < runs_table.SIGNIFICANT else "may be by chance"
        rows.append([one.first, one.second, f"{one.difference:+.4f}", p, verdict])
    return rows


def tables(groups: Sequence[runs_table.Group], measure: str) -> dict[str, Rows]:
    """All three tables by title, without empty ones."""
    welch = f"Two-sided Welch's t-test; p < {runs_table.SIGNIFICANT} counts as a difference"
    by_title = {
        "Results": results(groups, measure),
        "Where configs differ": settings(groups),
        welch: tests(groups, measure),
    }
    return {title: rows for title, rows in by_title.items() if len(rows) > 1}


def as_text(titled: Mapping[str, Rows]) -> str:
    """Formats tables as plain text."""
    return "\n\n".join("\n".join([title, *aligned(rows)]) for title, rows in titled.items())
