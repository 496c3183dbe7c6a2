"""Sweeps of tiny real runs: their files, no repeated trials, and the same results after being killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import BASE, ROOT, overrides, train

from gptjax import config as configs
from gptjax.config.errors import ConfigError, DataError
from gptjax.sweeps import folder as folders
from gptjax.sweeps import results as outcomes
from gptjax.sweeps import space, training
from gptjax.sweeps import sweep as sweeping
from gptjax.sweeps.plots import limits, medians
from gptjax.sweeps.results import DIVERGED, DONE, Result
from gptjax.sweeps.trials import Search

sys.path.append(str(ROOT / "experiments"))

import sweep

RATE = "optimizer.learning_rate"


def flags(text_file, *more):
    return [f"--config={BASE}", *overrides(data_path=text_file), *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, text_file):
    """Directory of a grid of two rates and a third that diverges, with the results that were reported."""
    folder, told = tmp_path_factory.mktemp("sweeps") / "lr", []
    own = overrides(data_path=text_file, guard_patience=1)
    search = Search(BASE, own, space.read([f"{RATE}=1e-3,1e-1,1e30"], BASE, own))
    results = sweeping.run(search, folder, on_result=told.append)
    return folder, results, told, own


@pytest.mark.slow
def test_a_trial_equals_a_run_of_train_and_a_diverged_one_is_a_result(swept, text_file, tmp_path, call):
    folder, results, told, own = swept
    assert results == told and [one.status for one in results] == [DONE, DONE, DIVERGED]
    alone = call(train, f"--config={BASE}", *own, f"--config.{RATE}=0.1", f"--workdir={tmp_path / 'run'}", "--json")
    assert json.loads(alone.out.splitlines()[-1])["val_loss"] == results[1].loss
    ours, theirs = (
        [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder / "trials" / results[1].name, tmp_path / "run")
    )
    assert ours == theirs


@pytest.mark.slow
def test_the_same_command_repeats_nothing_and_writes_the_report(swept, call, monkeypatch):
    folder, results, _, own = swept
    monkeypatch.setattr(training, "train", None)
    command = [f"--config={BASE}", *own, "--set", f"{RATE}=1e-3,1e-1,1e30", f"--workdir={folder}"]
    found = call(sweep, *command)
    assert found.code == 0 and "finished before: 3 of 3 trials" in found.err, found.err
    assert "best            learning_rate=0.1: held-out loss" in found.out and "2 done, 1 diverged" in found.out
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(float(row[RATE]), row["status"]) for row in rows] == [(0.1, DONE), (0.001, DONE), (1e30, DIVERGED)]
    assert float(rows[0]["loss"]) == results[1].loss and rows[2]["loss"] == ""
    assert (folder / "plots" / f"{RATE}.png").stat().st_size > 5000
    best = configs.flatten(configs.read(str(folder / "best.py")))
    assert best == configs.flatten(configs.read(BASE, own)) | {RATE: 0.1}
    (summary,) = map(json.loads, call(sweep, *command, "--json").out.splitlines())
    assert summary["best"]["loss"] == results[1].loss and summary["by_status"] == {DONE: 2, DIVERGED: 1}


@pytest.mark.slow
def test_another_config_or_other_keys_in_the_same_directory_are_refused(swept, call):
    folder, _, _, own = swept
    command = [f"--config={BASE}", *own, f"--workdir={folder}", "--set"]
    before = (folder / "sweep.json").read_text()
    other = call(sweep, *command, f"{RATE}=1e-3", "--config.train.steps=9").refusal()
    assert "belongs to another sweep: schedule.decay_steps (8 there, 9 here); train.steps (8 there, 9 here)" in other
    assert "keys (optimizer.learning_rate there, seed here)" in call(sweep, *command, "seed=1").refusal()
    assert "how (grid there, random here)" in call(sweep, *command, f"{RATE}=1.0", "--random=1").refusal()
    assert (folder / "sweep.json").read_text() == before


@pytest.mark.slow
def test_an_interrupted_sweep_saves_and_resumes(tmp_path, text_file, call, monkeypatch):
    command = flags(text_file, "--set", f"{RATE}=0.1", f"--workdir={tmp_path / 'sweep'}")
    take = training.train

    def interrupted(trial, watch):
        def line(_, found):
            if found["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)

        watch.line = line
        return take(trial, watch)

    monkeypatch.setattr(training, "train", interrupted)
    found = call(sweep, *command)
    assert found.code == 130 and "the same command resumes training" in found.err, found.err
    assert not (tmp_path / "sweep" / "results.csv").exists()
    monkeypatch.setattr(training, "train", take)
    assert call(sweep, *command).code == 0
    (run,) = (tmp_path / "sweep" / "trials").iterdir()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6, 8]


def test_one_process_sweeps_at_a_time(tmp_path):
    search = Search(BASE, overrides(), {"seed": (0,)})
    folders.open_or_create(tmp_path / "sweep", search)
    other = folders.lock_sweep(tmp_path / "sweep")
    with folders.lock_sweep(tmp_path / "sweep"), pytest.raises(ConfigError, match="another process is sweeping"), other:
        pass


def test_of_two_processes_that_start_a_sweep_one_creates_its_directory(tmp_path, monkeypatch):
    search = Search(BASE, overrides(), {"seed": (0,)})
    own = folders.open_or_create(tmp_path / "sweep", search)
    monkeypatch.setattr(folders, "is_new_or_empty", lambda folder: True)  # as the other one saw it
    assert folders.open_or_create(tmp_path / "sweep", search) == own
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def test_the_best_over_seeds_has_the_lowest_mean_and_no_failed_seed():
    losses = {0.1: (1.0, 3.0), 0.01: (1.8, 1.9), 0.001: (0.5, None)}
    results = [
        Result(f"{rate}-{seed}", {RATE: rate, "seed": seed}, DIVERGED if loss is None else DONE, loss)
        for rate, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    first, second, last = outcomes.groups(results)
    assert first.values == {RATE: 0.01} and first.mean == pytest.approx(1.85)
    assert first.deviation == pytest.approx(0.05 * 2**0.5) and second.mean == 2.0
    assert last.mean == float("inf") and last.losses == [0.5]
    assert outcomes.best(results) == results[2]
    assert outcomes.best(results[4:5]) == results[4] and outcomes.best([]) is None


def test_results_are_read_from_csv(tmp_path):
    results = [
        Result("b", {RATE: 1e-3, "model.windows": (8, 0), "optimizer.name": "lion"}, DONE, 2.5, 8, 1.5, 900.0),
        Result("a", {RATE: 0.1, "model.windows": (0,), "optimizer.name": "adamw"}, DIVERGED, None, 3, 0.5, note="1e5"),
    ]
    outcomes.write_csv(tmp_path, results)
    assert outcomes.read_csv(tmp_path) == results
    with pytest.raises(DataError, match=r"has no results\.csv"):
        outcomes.read_csv(tmp_path / "nothing")


def test_medians_and_limits_of_plots():
    assert medians([(1.0, 5.0), (2.0, 1.0), (1.0, 3.0), (1.0, 10.0)], False) == [(1.0, 5.0), (2.0, 1.0)]
    drawn = [(float(x), float(x)) for x in range(9)]
    assert medians(drawn, True) == [(1.0, 1.0), (4.0, 4.0), (7.0, 7.0)]
    low, high = limits([3.0, 3.1, 3.2, 1000.0])
    assert low < 3.0 and 3.2 < high < 10


def losses(folder):
    return {row["trial"]: row["loss"] for row in csv.DictReader((folder / "results.csv").open())}


def start(folder, text_file, *more):
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *flags(text_file, *more), f"--workdir={folder}"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for(what, process):
    """Waits for a condition; the process must not end before."""
    while not what():
        assert process.poll() is None
        time.sleep(0.05)


GRID = ("--set", f"{RATE}=1e-3,1e-2,1e-1")
STUDY = ("--set", f"{RATE}=log:1e-3..1", "--optuna=3")


@pytest.mark.slow
@pytest.mark.parametrize("way, begun", [(GRID, 2), (STUDY, 1)], ids=["grid", "study"])  # a study stops its second early
def test_a_killed_sweep_ends_with_the_same_results(tmp_path, text_file, way, begun):
    if way == STUDY:
        pytest.importorskip("optuna", reason="optuna is not installed")
    more = (*way, "--config.train.steps=200", "--config.checkpoint.every_steps=20", "--config.eval.every_steps=60")
    cut, whole = tmp_path / "sweep", tmp_path / "whole" / "sweep"
    assert start(whole, text_file, *more).wait() == 0
    process = start(cut, text_file, *more)
    wait_for(lambda: len({path.parent for path in (cut / "trials").glob("*/checkpoints/*0")}) == begun, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "results.csv").exists()
    assert start(cut, text_file, *more).wait() == 0
    assert losses(cut) == losses(whole) and len(losses(whole)) == 3


@pytest.mark.slow
def test_two_workers_on_one_journal_repeat_no_trial(tmp_path, text_file):
    pytest.importorskip("optuna", reason="optuna is not installed")
    more = ("--set", f"{RATE}=log:1e-3..1", "--optuna=8", f"--storage={tmp_path / 'journal'}", "--study=both")
    first, second = (start(tmp_path / name, text_file, *more) for name in ("a", "b"))
    assert (first.wait(), second.wait()) == (0, 0)
    begun = [run.name for name in ("a", "b") for run in (tmp_path / name / "trials").iterdir()]
    assert len(begun) == len(set(begun)) == 8
    assert (tmp_path / "a" / "trials").exists() and (tmp_path / "b" / "trials").exists()
    assert max(len(losses(tmp_path / name)) for name in ("a", "b")) == 8
