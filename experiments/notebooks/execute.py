"""Runs a notebook from its first cell to its last, with other values in its cell of parameters if asked.

python experiments/notebooks/execute.py experiments/notebooks/1_first_look.ipynb                 # outputs go into it
python experiments/notebooks/execute.py experiments/notebooks/1_first_look.ipynb run='"runs/mine"' --to=mine.ipynb

The cell of parameters is the one tagged so; it holds assignments alone, and values are Python's. A kernel works in the
repository's root. What tells two executions of the same notebook apart, such as times, is not written, nor is what went
to stderr, such as progress.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments

ROOT = Path(__file__).resolve().parents[2]
TAG = "parameters"


def with_values(source: str, values: Mapping[str, Any]) -> str:
    """A cell of assignments with other values; its comments behind what is changed are dropped.

    Raises:
      ConfigError: a name that the cell does not assign.
    """
    lines = source.splitlines()
    found = {
        target.id: (node.lineno - 1, node.end_lineno)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in values:
        if name not in found:
            raise ConfigError(f"the notebook has no value {name!r}; it has {', '.join(found) or 'none'}")
    for name in sorted(values, key=lambda name: found[name][0], reverse=True):
        begin, end = found[name]
        lines[begin:end] = [f"{name} = {values[name]!r}"]
    return "\n".join(lines)


def parameters_of(notebook: Any) -> Any:
    """The cell whose values can be others.

    Raises:
      ConfigError: there is none.
    """
    for cell in notebook.cells:
        if TAG in cell.metadata.get("tags", ()):
            return cell
    raise ConfigError(f"the notebook has no cell tagged {TAG!r}, and so no values")


def executed(notebook: Any, values: Mapping[str, Any], timeout: int = 3600) -> Any:
    """The same notebook with the outputs of its cells.

    Args:
      notebook: nbformat's.
      values: of the cell of parameters, by name.
      timeout: seconds that one cell may take.

    Raises:
      ConfigError: a value that the notebook does not have.
      nbclient.exceptions.CellExecutionError: a cell failed; says which and how.
    """
    from nbclient import NotebookClient

    if values:
        cell = parameters_of(notebook)
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
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def read_values(pairs: Sequence[str]) -> dict[str, Any]:
    """Values by name, of NAME=VALUE.

    Raises:
      ConfigError: one is not of that form.
    """
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            form = "NAME=VALUE, the value in Python's own form, such as 'run=\"runs/mine\"'"
            raise ConfigError(f"{pair!r} is not of the form {form}") from error
    return values


def main(argv: Sequence[str]) -> None:
    """Executes one notebook and writes it."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("values", nargs="*", help="NAME=VALUE of the cell of parameters")
    parser.add_argument("--to", type=Path, help="where the executed notebook goes; default: into its place")
    flags = parser.parse_args(argv)
    try:
        import nbformat
        from nbclient.exceptions import CellExecutionError
    except ImportError:
        raise ConfigError("notebooks are executed by nbclient: pip install -e '.[notebooks]'") from None
    if not flags.notebook.is_file():
        raise ConfigError(f"there is no notebook {flags.notebook}")
    try:
        done = executed(nbformat.read(flags.notebook, as_version=4), read_values(flags.values))
    except CellExecutionError as error:
        what = f"{error.ename}: {error.evalue}"
        raise ConfigError(f"a cell of {flags.notebook} failed, and nothing was written: {what}") from error
    nbformat.write(done, flags.to or flags.notebook)


if __name__ == "__main__":
    arguments.run(main)
