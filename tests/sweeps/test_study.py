"""Sweeps by an Optuna study, with trials whose loss is a formula instead of a run."""

import math
import sys

import pytest
from conftest import BASE, overrides

from gptjax.config.errors import ConfigError, Interrupted
from gptjax.sweeps import results as outcomes
from gptjax.sweeps import space, study, sweep, training
from gptjax.sweeps.results import DIVERGED, DONE, PRUNED, Result
from gptjax.sweeps.trials import Search

pytest.importorskip("optuna", reason="optuna is not installed")

RATE = "optimizer.learning_rate"


def searched(*sets, n_trials=8, seed=0):
    flags = overrides()
    return Search(BASE, flags, space.read(sets, BASE, flags), "optuna", n_trials, seed)


def loss_of(values):
    """Loss with its minimum at a rate of 0.01."""
    return math.log10(values[RATE] / 0.01) ** 2


@pytest.fixture
def formula(monkeypatch):
    """Replaces training by a formula; yields the suggested values. Trials with a rate above 1 diverge."""
    asked = []

    def train(trial, watch, on_line=lambda line: None):
        asked.append(trial.values)
        if trial.values[RATE] > 1:
            return Result(trial.name, trial.values, DIVERGED)
        loss = loss_of(trial.values)
        try:
            for step in (4, 8):
                on_line({"step": step, "val/loss": loss})
        except training.Pruned:
            return Result(trial.name, trial.values, PRUNED, loss, step)
        return Result(trial.name, trial.values, DONE, loss, step)

    monkeypatch.setattr(training, "train", train)
    return asked


def run(search, folder, storage="", on_result=lambda result: None):
    return sweep.run_study(search, folder, sweep.Storage(str(storage), "one"), on_result)


def test_a_study_finds_the_minimum_and_prunes_worse_trials(tmp_path, formula):
    found = run(searched(f"{RATE}=log:1e-5..10", n_trials=30), tmp_path / "a")
    assert len(found) == 30
    by_status = {status: [one for one in found if one.status == status] for status in (DONE, PRUNED, DIVERGED)}
    assert all(by_status.values())
    assert outcomes.best(found).loss < 0.05
    assert max(one.loss for one in by_status[DONE][2:]) < max(one.loss for one in by_status[PRUNED])


def test_an_interrupted_study_suggests_the_same_values(tmp_path, formula):
    search = searched(f"{RATE}=log:1e-5..1", "model.use_bias=true,false", n_trials=14)
    whole = run(search, tmp_path / "whole")

    def interrupt(result):
        if len(formula) == 14 + 6:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        run(search, tmp_path / "cut", on_result=interrupt)
    assert run(search, tmp_path / "cut") == whole and len(formula) == 28
    assert run(search, tmp_path / "cut") == whole and len(formula) == 28, "a finished one repeats nothing"
    more = run(search._replace(n_trials=16), tmp_path / "cut")
    assert more[:14] == whole and len(more) == 16


def test_an_abandoned_trial_is_resumed(tmp_path, formula, monkeypatch):
    search = searched(f"{RATE}=log:1e-5..1", n_trials=4)
    whole = run(search, tmp_path / "whole")
    train, calls = training.train, []

    def die(trial, watch, on_line):
        calls.append(trial)
        if len(calls) == 3:
            on_line({"step": 4, "val/loss": loss_of(trial.values)})
            raise Interrupted(15)
        return train(trial, watch, on_line)

    monkeypatch.setattr(training, "train", die)
    with pytest.raises(Interrupted):
        run(search, tmp_path / "cut")
    assert run(search, tmp_path / "cut") == whole
    assert calls[2].values == calls[3].values, "the one in hand comes first"


def test_lists_are_exhausted_without_duplicates(tmp_path, formula):
    found = run(searched(f"{RATE}=0.01,0.1", "data.stages=((4,8,16),),()", n_trials=50), tmp_path / "a")
    assert len(found) == len(formula) == 4
    assert all(one not in formula[:number] for number, one in enumerate(formula))
    assert {one.values["data.stages"] for one in found} == {((4, 8, 16),), ()}


@pytest.mark.slow
def test_workers_in_their_own_directories_share_a_storage(tmp_path, formula):
    search = searched(f"{RATE}=log:1e-5..1", n_trials=3)
    database = f"sqlite:///{tmp_path / 'study.db'}"
    first = run(search, tmp_path / "a", database)
    both = run(search._replace(n_trials=5), tmp_path / "b", database)
    assert both[:3] == first and len(both) == len(formula) == 5


def test_a_surplus_trial_is_skipped(tmp_path, formula):
    """Two workers may both see that one trial is missing; the one with the higher number is skipped."""
    search = searched(f"{RATE}=log:1e-5..1", n_trials=2)
    run(search, tmp_path / "a")
    again = study.open_study(search, tmp_path / "a", "elsewhere", "", "one")
    assert "enough trials" in study.skip_reason(again, again.optuna.ask())


def test_a_study_of_another_sweep_and_an_invalid_storage_are_refused(tmp_path, formula):
    search = searched(f"{RATE}=log:1e-5..1", n_trials=1)
    run(search, tmp_path / "a", tmp_path / "journal")
    wider = searched(f"{RATE}=log:1e-5..2", n_trials=1)
    with pytest.raises(ConfigError, match="the study one belongs to another sweep: --set optimizer.learning_rate"):
        run(wider, tmp_path / "b", tmp_path / "journal")
    with pytest.raises(ConfigError, match="belongs to another sweep"):
        run(search._replace(overrides=overrides(train_steps=9)), tmp_path / "a", tmp_path / "journal")
    with pytest.raises(ConfigError, match="the database cannot be opened") as refused:
        run(search, tmp_path / "c", "nosuch://me:secret@host/db")
    assert "secret" not in str(refused.value)


def test_without_optuna_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptjax\[sweeps\]'"):
        run(searched(f"{RATE}=log:1e-5..1", n_trials=1), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_impossible_trial_is_a_result(tmp_path, formula):
    found = run(searched("model.kv_heads=2,3", f"{RATE}=0.01", n_trials=2), tmp_path / "a")
    impossible = next(one for one in found if one.values["model.kv_heads"] == 3)
    assert impossible.status == "impossible" and "kv_heads" in impossible.note
    assert len(formula) == 1
