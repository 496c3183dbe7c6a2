"""Runs beside each other for the eye: curves of groups of them, and tables of what they ended with and differ in.

Takes what gptjax.sweeps.runs_table reads and groups; reads no file and writes none.
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
    """A panel for each axis: what was held out as dots and lines, a color for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained", dpi=100)
    panels = figure.subplots(2, 2, sharey=True)
    values = np.concatenate([run.columns[f"val/{measure}"] for group in groups for run in group.runs])
    values = values[~np.isnan(values)]
    for axes, (axis, label) in zip(panels.flat, runs_table.AXES.items(), strict=True):
        for group, color in zip(groups, colors(len(groups)), strict=True):
            for i, run in enumerate(group.runs):
                at = run.looks(measure)
                x, y = run.columns[axis][at], run.columns[f"val/{measure}"][at]
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
    """A row for each group: how many runs, and mean and standard deviation of what they ended with."""
    rows = [["", "runs", "finished", runs_table.MEASURES[measure], "standard deviation", "tokens", "FLOPs", "minutes"]]
    for group in groups:
        own = runs_table.ends(group, measure)
        last = {axis: np.median([run.columns[axis][-1] for run in group.runs]) for axis in runs_table.AXES}
        rows.append(
            [
                group.name, str(len(group.runs)), str(len(own)),
                f"{np.mean(own):.4f}" if own else "", f"{np.std(own, ddof=1):.4f}" if len(own) > 1 else "",
                f"{last['tokens']:,.0f}", f"{last['flops']:.2e}", f"{last['seconds'] / 60:.1f}",
            ]
        )  # fmt: skip
    return rows


def settings(groups: Sequence[runs_table.Group]) -> Rows:
    """A row for each key in which configs differ."""
    found = runs_table.differing([group.runs[0] for group in groups])
    return [["key", *(group.name for group in groups)], *([key, *map(str, own)] for key, own in found.items())]


def tests(groups: Sequence[runs_table.Group], measure: str) -> Rows:
    """A row for each two groups: Welch's t-test of what they ended with."""
    rows = [["", "and", "difference of means", "p", ""]]
    for one in runs_table.welch(groups, measure):
        p, said = "", "two finished runs of each, which spread, are needed"
        if one.p is not None:
            p, said = f"{one.p:.2g}", "differ" if one.p < runs_table.SIGNIFICANT else "may be by chance"
        rows.append([one.first, one.second, f"{one.difference:+.4f}", p, said])
    return rows


def tables(groups: Sequence[runs_table.Group], measure: str) -> dict[str, Rows]:
    """All three by title; those without a row are left out."""
    welch = f"Welch's t-test of both sides; p < {runs_table.SIGNIFICANT} counts as a difference"
    found = {
        "Results": results(groups, measure),
        "Where configs differ": settings(groups),
        welch: tests(groups, measure),
    }
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def as_text(titled: Mapping[str, Rows]) -> str:
    """Tables in plain text."""
    return "\n\n".join("\n".join([title, *aligned(rows)]) for title, rows in titled.items())
