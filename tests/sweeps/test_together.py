"""Trials of a sweep as one compiled program: the same results, refusals, and evolution."""

import csv
import sys

import pytest
from conftest import BASE, ROOT, overrides

sys.path.append(str(ROOT / "experiments"))

import sweep

RATE = "optimizer.learning_rate"


def rows(folder):
    return {row[RATE]: row for row in csv.DictReader((folder / "results.csv").open())}


@pytest.mark.slow
def test_vmapped_trials_equal_sequential_ones(text_file, tmp_path, call):
    own = overrides(data_path=text_file, guard_patience=1)
    command = [f"--config={BASE}", *own, "--set", f"{RATE}=1e-3,1e-2,1e30"]
    together = call(sweep, *command, f"--workdir={tmp_path / 'together'}", "--vmap")
    assert together.code == 0, together.err
    assert call(sweep, *command, f"--workdir={tmp_path / 'apart'}").code == 0
    here, there = rows(tmp_path / "together"), rows(tmp_path / "apart")
    assert here.keys() == there.keys() and here["1e+30"]["status"] == there["1e+30"]["status"] == "diverged"
    for rate in ("0.001", "0.01"):
        assert float(here[rate]["loss"]) == pytest.approx(float(there[rate]["loss"]), abs=1e-5)
    again = call(sweep, *command, f"--workdir={tmp_path / 'together'}", "--vmap")
    assert "finished before: 3 of 3 trials" in again.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "model.mlp_width=32,64", "--vmap"], "model.mlp_width (32, 64) changes the compiled program"),
        (["--set", "seed=0,1", "--evolve=2"], "sweep a key"),
        (["--set", f"{RATE}=log:1e-3..1e-2", "--optuna=2", "--vmap"], "leave --vmap and --evolve out"),
    ],
)
def test_refused_in_one_line(more, said, text_file, tmp_path, call):
    command = [f"--config={BASE}", *overrides(data_path=text_file), *more, f"--workdir={tmp_path / 'sweep'}"]
    refused = call(sweep, *command)
    assert refused.code == 2 and said in refused.err and refused.err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_members_evolve(text_file, tmp_path, call):
    own = overrides(data_path=text_file, train_steps=12)
    command = [f"--config={BASE}", *own, "--set", f"{RATE}=1e-2,8e-3,1e-7", "--evolve=4"]
    found = call(sweep, *command, f"--workdir={tmp_path / 'sweep'}")
    assert found.code == 0, found.err
    assert rows(tmp_path / "sweep")["1e-07"]["note"].startswith("evolved: learning_rate=")
