"""Runs a notebook from its first cell to its last, with other values in its cell of parameters if asked.

python experiments/notebooks/execute.py experiments/notebooks/1_first_look.ipynb                 # outputs go into it
python experiments/notebooks/execute.py experiments/notebooks/1_first_look.ipynb run='"runs/mine"' --to=/tmp/mine.ipynb

The cell of parameters is the one tagged so; it holds assignments alone, and values are Python's. A kernel works in the
repository's root. What tells two executions of the same notebook apart, such as times, is not written.
"""

import argparse
import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAG = "parameters"


def with_values(source: str, values: Mapping[str, Any]) -> str:
    """A cell of assignments with other values; its comments behind what is changed are dropped.

    Raises:
      KeyError: a name that the cell does not assign.
    """
    lines = source.splitlines()
    found = {
        target.id: (node.lineno - 1, node.end_lineno)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in sorted(values, key=lambda name: found[name][0], reverse=True):
        begin, end = found[name]
        lines[begin:end] = [f"{name} = {values[name]!r}"]
    return "\n".join(lines)


def executed(notebook: Any, values: Mapping[str, Any], timeout: int = 3600) -> Any:
    """The same notebook with the outputs of its cells.

    Args:
      notebook: nbformat's.
      values: of the cell of parameters, by name.
      timeout: seconds that one cell may take.

    Raises:
      KeyError: a value that the notebook does not have.
      nbclient.exceptions.CellExecutionError: a cell failed; says which and how.
    """
    from nbclient import NotebookClient

    if values:
        cell = next(cell for cell in notebook.cells if TAG in cell.metadata.get("tags", ()))
        cell.source = with_values(cell.source, values)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Executes one notebook and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("values", nargs="*", help="NAME=VALUE of the cell of parameters")
    parser.add_argument("--to", type=Path, help="where the executed notebook goes; default: into its place")
    flags = parser.parse_args()
    try:
        import nbclient  # noqa: F401
        import nbformat
    except ImportError:
        print("notebooks are executed by nbclient: pip install -e '.[notebooks]'", file=sys.stderr)
        raise SystemExit(2) from None
    values = {name: ast.literal_eval(value) for name, _, value in (pair.partition("=") for pair in flags.values)}
    done = executed(nbformat.read(flags.notebook, as_version=4), values)
    nbformat.write(done, flags.to or flags.notebook)


if __name__ == "__main__":
    main()
