"""Runs beside each other on one page: curves over steps, tokens, seconds and FLOPs, configs as a difference only, and
whether runs with several seeds differ by more than chance.

python experiments/compare.py runs/a runs/b
python experiments/compare.py sweeps/lr/trials/* --out=runs/comparison --json

Runs that differ in their seed alone are one group; of each two groups with several finished runs Welch's t-test says
how likely such a difference is by chance. Writes compare.png and compare.html, which needs no other file, to --out.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import command, runtime
from gptjax.config import ConfigError
from gptjax.files import is_free, write_atomic

PAGE, PICTURE = "compare.html", "compare.png"
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; margin: 0 0 1.5rem }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .8rem; text-align: left }"""
Rows = list[list[str]]  # the first has the columns' names


def plot(groups: Sequence[Any], measure: str, path: Path) -> None:
    """A panel for each axis: what was held out as dots and lines, a colour for each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from gptjax.inspect import runs

    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharey=True)
    colours = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    values = np.concatenate([run.columns[f"val/{measure}"] for group in groups for run in group.runs])
    values = values[~np.isnan(values)]
    for axes, (axis, label) in zip(panels.flat, runs.AXES.items(), strict=True):
        for number, group in enumerate(groups):
            colour = colours[number % len(colours)]
            for i, run in enumerate(group.runs):
                at = run.looks(measure)
                x, y = run.columns[axis][at], run.columns[f"val/{measure}"][at]
                name = f"{group.name} ({len(group.runs)} runs)" if len(group.runs) > 1 else group.name
                axes.plot(x, y, color=colour, marker="o", markersize=2.5, linewidth=1, label="" if i else name)
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    least, middle, most = np.min(values), np.median(values), np.max(values)
    panels[0, 0].set_ylim(least - 0.05 * (middle - least), min(most, middle + 3 * (middle - least)) * 1.02)
    for axes in panels[:, 0]:
        axes.set_ylabel(runs.MEASURES[measure])
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if max(map(len, names)) < 60 else 1, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def results(groups: Sequence[Any], measure: str) -> Rows:
    """A row for each group: how many runs, and mean and standard deviation of what they ended with."""
    from gptjax.inspect import runs

    rows = [["", "runs", "finished", runs.MEASURES[measure], "standard deviation", "tokens", "FLOPs", "minutes"]]
    for group in groups:
        own = runs.ends(group, measure)
        last = {axis: np.median([run.columns[axis][-1] for run in group.runs]) for axis in runs.AXES}
        rows.append(
            [
                group.name, str(len(group.runs)), str(len(own)),
                f"{np.mean(own):.4f}" if own else "", f"{np.std(own, ddof=1):.4f}" if len(own) > 1 else "",
                f"{last['tokens']:,.0f}", f"{last['flops']:.2e}", f"{last['seconds'] / 60:.1f}",
            ]
        )  # fmt: skip
    return rows


def settings(groups: Sequence[Any]) -> Rows:
    """A row for each key in which configs differ."""
    from gptjax.inspect import runs

    found = runs.differing([group.runs[0] for group in groups])
    return [["key", *(group.name for group in groups)], *([key, *map(str, own)] for key, own in found.items())]


def tests(groups: Sequence[Any], measure: str) -> Rows:
    """A row for each two groups."""
    from gptjax.inspect import runs

    rows = [["", "and", "difference of means", "p", ""]]
    for one in runs.welch(groups, measure):
        p, said = "", "two finished runs of each, which spread, are needed"
        if one.p is not None:
            p, said = f"{one.p:.2g}", "differ" if one.p < runs.SIGNIFICANT else "may be by chance"
        rows.append([one.first, one.second, f"{one.difference:+.4f}", p, said])
    return rows


def sections(groups: Sequence[Any], measure: str) -> dict[str, Rows]:
    """The tables of the page, by title; those without a row are left out."""
    from gptjax.inspect import runs

    welch = f"Welch's t-test of both sides; p < {runs.SIGNIFICANT} counts as a difference"
    found = {
        "Results": results(groups, measure),
        "Where configs differ": settings(groups),
        welch: tests(groups, measure),
    }
    return {title: rows for title, rows in found.items() if len(rows) > 1}


def as_html(tables: dict[str, Rows], picture: bytes) -> str:
    """The page, with its picture in it."""
    body = [f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">']
    for title, rows in tables.items():
        cells = [[html.escape(cell) for cell in row] for row in rows]
        head = "".join(f"<th>{cell}</th>" for cell in cells[0])
        lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in cells[1:])
        body.append(f"<h2>{html.escape(title)}</h2>\n<table>\n<tr>{head}</tr>\n{lines}</table>")
    inside = "\n".join(["<h1>Runs compared</h1>", *body])
    head = f'<meta charset="utf-8"><title>Runs compared</title>\n<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{inside}\n</body></html>\n'


def as_text(tables: dict[str, Rows]) -> str:
    """The tables in plain text."""
    blocks = []
    for title, rows in tables.items():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def objects(groups: Sequence[Any], measure: str) -> list[dict[str, Any]]:
    """The same for --json: an object for each group, then one for each two."""
    from gptjax.inspect import runs

    table = runs.differing([group.runs[0] for group in groups])
    found: list[dict[str, Any]] = [
        {
            "group": group.name,
            "runs": [str(run.workdir) for run in group.runs],
            "measure": measure,
            "ends": runs.ends(group, measure),
            "config": {key: values[number] for key, values in table.items()},
        }
        for number, group in enumerate(groups)
    ]
    both = [one._asdict() for one in runs.welch(groups, measure)]
    return found + [one | {"significant": None if one["p"] is None else one["p"] < runs.SIGNIFICANT} for one in both]


def main(argv: Sequence[str]) -> None:
    """Compares the runs that the flags name."""
    parser = command.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="where page and picture go")
    flags = parser.parse_args(argv)
    if not is_free(flags.out) and not (flags.out / PAGE).is_file():
        raise ConfigError(f"{flags.out} exists and has no {PAGE}; give another --out")
    runtime.start()
    from gptjax.inspect import runs

    tables = [runs.read(workdir) for workdir in flags.runs]
    measure = runs.comparable(tables)
    groups = runs.grouped(tables)
    shown = sections(groups, measure)
    flags.out.mkdir(parents=True, exist_ok=True)
    plot(groups, measure, flags.out / PICTURE)
    write_atomic(flags.out / PAGE, as_html(shown, (flags.out / PICTURE).read_bytes()))
    if flags.json:
        print("\n".join(json.dumps(one) for one in objects(groups, measure)))
    else:
        print(f"{as_text(shown)}\n\n{flags.out / PAGE}")


if __name__ == "__main__":
    command.run(main)
