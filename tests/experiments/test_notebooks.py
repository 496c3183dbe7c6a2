"""Notebooks run from first cell to last on a tiny run; those committed show what a real run gave, and nothing else."""

import importlib.util
import json
import re

import pytest
from conftest import ROOT

from gptjax.config.errors import ConfigError

FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 700_000  # bytes
# Values under which each is executed here; {run}: a finished run with two checkpoints, {text}: what it read, {out}: a
# folder of the test's own.
TINY_VALUES = {
    "1_first_look.ipynb": {
        "text": "{text}",
        "mine": "{out}/mine",
        "tokenizer": "bytes",
        "steps": 8,
        "context": 16,
        "run": "{run}",
        "question": "again softly",
    },
    "2_parameters.ipynb": {"run": "{run}", "watched": "{run}"},
    "3_attention_and_induction.ipynb": {
        "run": "{run}",
        "sentence": "a word, a word",
        "steps": 4,
        "every": 2,
        "changes": (
            "--config.model.width=16",
            "--config.model.heads=2",
            "--config.model.context=16",
            "--config.data.batch_size=4",
        ),
        "vocabulary": 16,
    },
    "4_logit_lens_and_patching.ipynb": {
        "run": "{run}",
        "right": "h",
        "wrong": "s",
        "clean": "one word",
        "corrupted": "two word",
        "rows": 8,
        "tokens": 16,
        "lens_steps": 2,
        "code_steps": 4,
        "features": 16,
    },
    "5_reading_a_sweep.ipynb": {
        "sweep": "{out}/sweep",
        "rates": "1e-3,1e-2",
        "seeds": "0,1",
        "text": "{text}",
        "tokenizer": "bytes",
        "steps": 6,
        "context": 16,
    },
}
QUICK = "2_parameters.ipynb"
CELL = """\
# Where it is.
run = "runs/a"  # a directory
words = (
    "one",
    "two",
)
steps = 3
"""


@pytest.fixture(scope="module")
def execute():
    found = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def nbformat():
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[notebooks]'")
    return pytest.importorskip("nbformat", reason="nbformat is not installed: pip install -e '.[notebooks]'")


@pytest.fixture
def small(nbformat, tmp_path):
    """A notebook file with one value, which is printed to both streams, and 1 divided by it."""
    cells = [nbformat.v4.new_code_cell(source) for source in ("n = 1", "import sys\nprint(n)", "1 / n")]
    cells[1].source += "\nprint('progress', file=sys.stderr)"
    cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def cells(path):
    """The code cells of a notebook file."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_values_take_the_place_of_assignments(execute):
    changed = execute.with_values(CELL, {"steps": 7, "words": ("a b",), "run": "runs/b"})
    assert changed == "# Where it is.\nrun = 'runs/b'\nwords = ('a b',)\nsteps = 7"
    assert execute.with_values(CELL, {"run": "x"}) == CELL.replace('"runs/a"  # a directory', "'x'").rstrip()
    assert execute.with_values(CELL, {}) == CELL.rstrip()


def test_a_value_that_is_not_there_is_refused(execute):
    with pytest.raises(ConfigError, match="no value 'stesp'; it has run, words, steps"):
        execute.with_values(CELL, {"stesp": 7})


def test_the_commands_mistakes_are_one_line_and_write_nothing(execute, small, call):
    before = small.read_bytes()
    assert call(execute, small, "m=2").refusal() == "the notebook has no value 'm'; it has n"
    assert "NAME=VALUE" in call(execute, small, "n=two words").refusal()
    assert "there is no notebook" in call(execute, small.with_name("other.ipynb")).refusal()
    assert small.read_bytes() == before


def test_the_command_executes_with_other_values_and_keeps_what_matters(execute, small, call, tmp_path):
    to = tmp_path / "to.ipynb"
    assert call(execute, small, "n=4", f"--to={to}").code == 0
    first, second, third = cells(to)
    assert first["source"] == ["n = 4"] and first["metadata"] == {"tags": ["parameters"]}
    assert [output["text"] for output in second["outputs"]] == [["4\n"]], "stderr is not kept"
    assert third["outputs"][0]["data"]["text/plain"] == ["0.25"] and second["metadata"] == {}
    before = small.read_bytes()
    failed = call(execute, small, "n=0")
    assert failed.code == 2 and "ZeroDivisionError: division by zero" in failed.err
    assert small.read_bytes() == before


def test_each_notebook_has_tiny_values():
    assert [path.name for path in NOTEBOOKS] == sorted(TINY_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in TINY_VALUES]
)
def test_a_notebook_runs_on_a_tiny_run(execute, nbformat, name, trained, text_file, tmp_path):
    places = {"run": trained, "text": text_file, "out": tmp_path}
    values = {
        key: value.format(**places) if isinstance(value, str) else value for key, value in TINY_VALUES[name].items()
    }
    done = execute.executed(nbformat.read(FOLDER / name, as_version=4), values, timeout=600)
    drawn = [output for output in outputs(done) if "image/png" in output.get("data", {})]
    committed = json.loads((FOLDER / name).read_text())
    expected = sum("image/png" in output.get("data", {}) for output in outputs(committed))
    without = name == QUICK  # the tiny run has no log.statistics, and so one picture less
    assert len(drawn) == expected - without


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_shows_a_run_of_all_its_cells(path):
    assert path.stat().st_size < LARGEST
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    shown = outputs({"cells": cells(path)})
    assert {output["output_type"] for output in shown} <= {"stream", "execute_result", "display_data"}
    assert not any(output.get("name") == "stderr" for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_names_no_place_of_a_machine(path):
    found = json.loads(path.read_text())
    for output in outputs(found):
        output.get("data", {}).pop("image/png", None)
    text = json.dumps(found)
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(home|Users|root|tmp|work|mnt|opt|usr|var)/", text)
