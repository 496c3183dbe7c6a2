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

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime
from gptjax.core.console import Rows
from gptjax.core.files import is_new_or_empty, write_atomic

PAGE, PICTURE = "compare.html", "compare.png"
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse; margin: 0 0 1.5rem }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .8rem; text-align: left }"""


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


def objects(groups: Sequence[Any], measure: str) -> list[dict[str, Any]]:
    """The same for --json: an object for each group, then one for each two."""
    from gptjax.sweeps import runs_table

    table = runs_table.config_differences([group.runs[0] for group in groups])
    found: list[dict[str, Any]] = [
        {
            "group": group.name,
            "runs": [str(run.workdir) for run in group.runs],
            "measure": measure,
            "ends": runs_table.final_values(group, measure),
            "config": {key: values[number] for key, values in table.items()},
        }
        for number, group in enumerate(groups)
    ]
    both = [one._asdict() for one in runs_table.welch(groups, measure)]
    return found + [
        one | {"significant": None if one["p"] is None else one["p"] < runs_table.SIGNIFICANT} for one in both
    ]


def main(argv: Sequence[str]) -> None:
    """Compares the runs that the flags name."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="where page and picture go")
    flags = parser.parse_args(argv)
    if not is_new_or_empty(flags.out) and not (flags.out / PAGE).is_file():
        raise ConfigError(f"{flags.out} exists and has no {PAGE}; give another --out")
    runtime.start()
    from gptjax.sweeps import comparison, runs_table

    found = [runs_table.read(workdir) for workdir in flags.runs]
    measure = runs_table.comparable(found)
    groups = runs_table.group_runs(found)
    tables = comparison.tables(groups, measure)
    flags.out.mkdir(parents=True, exist_ok=True)
    comparison.curves(groups, measure).savefig(flags.out / PICTURE, dpi=110)
    write_atomic(flags.out / PAGE, as_html(tables, (flags.out / PICTURE).read_bytes()))
    if flags.json:
        print("\n".join(json.dumps(one) for one in objects(groups, measure)))
    else:
        print(f"{comparison.as_text(tables)}\n\n{flags.out / PAGE}")


if __name__ == "__main__":
    arguments.run(main)
