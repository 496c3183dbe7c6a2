"""Wall time by kind: each second is counted once, including those of killed processes."""

import signal
import time
from types import SimpleNamespace

import pytest
from conftest import tiny_config
from training_processes import lines_of, reached, start

from gptjax.runs.checkpoints import Checkpoints
from gptjax.training import loop
from gptjax.training.monitoring import goodput
from gptjax.training.setup import TrainSetup


def times_of(line):
    return {kind: line[f"time/{kind}"] for kind in goodput.KINDS}


def test_nested_blocks_are_counted_separately(monkeypatch):
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now.at)

    def passes(seconds):
        now.at += seconds

    clock = goodput.Clock(0.0)
    passes(1)
    with clock.during("step"):
        passes(10)
        with clock.during("eval"):
            passes(100)
            with clock.during("data"):
                passes(1000)
            passes(100)
        passes(10)
        assert clock.reading()["step"] == 20, "also while it is counting"
    with pytest.raises(KeyError), clock.during("save"):
        passes(5)
        raise KeyError
    passes(2)
    expected = {"start": 3, "step": 20, "eval": 200, "data": 1000, "save": 5}
    assert clock.reading() == goodput.zero_reading() | expected and goodput.total(clock.reading()) == now.at


def test_lost_time_is_removed_from_its_kind():
    clock = goodput.Clock(time.monotonic())
    saved = goodput.zero_reading() | {"step": 10.0, "lost": 2.0}
    killed = saved | {"step": 15.0, "save": 1.0, "down": 7.0}
    clock.add(killed)
    clock.lose(saved, killed)
    found = clock.reading()
    assert (found["step"], found["save"], found["lost"], found["down"]) == pytest.approx((10, 0, 8, 7), abs=0.01)


@pytest.mark.slow
def test_every_second_of_a_run_is_accounted_for(tmp_path, text_file, monkeypatch):
    """Slows down evaluations, saves and steps; exactly their kinds grow."""
    slower = {}

    def slow(owner, name, kind, seconds):
        original = getattr(owner, name)

        def planted(*arguments, **named):
            time.sleep(seconds)
            slower[kind] = slower.get(kind, 0) + seconds
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, planted)

    slow(TrainSetup, "evaluate", "eval", 0.2)
    slow(Checkpoints, "save", "save", 0.3)
    slow(loop.populations, "compile_steps", "compile", 0.4)
    slow(loop, "train_setup", "start", 0.5)
    slow(loop.report, "plot", "finish", 0.6)
    slow(loop.Recorder, "push", "step", 0.05)
    begin = time.monotonic()
    summary = loop.train(tiny_config(data_path=text_file, train_steps=12), tmp_path / "run")
    wall = time.monotonic() - begin
    times = times_of(summary)
    assert sum(times.values()) == pytest.approx(summary["seconds"], abs=0.01) == pytest.approx(wall, rel=0.01)
    for kind, seconds in slower.items():
        assert times[kind] >= seconds, kind
    assert times["lost"] == times["down"] == 0
    assert summary["goodput"] == pytest.approx(times["step"] / summary["seconds"], abs=0.001)
    for line in lines_of(tmp_path / "run"):
        assert sum(times_of(line).values()) == pytest.approx(line["seconds"], abs=0.01)
    assert not (tmp_path / "run" / "clock.json").exists(), "the summary has it"


@pytest.mark.slow
def test_time_of_a_killed_process_is_lost_and_time_without_one_is_down(tmp_path, text_file, capsys):
    run = dict(train_steps=700, checkpoint_every_steps=300, log_every_steps=50, model_dropout=0.1)
    workdir = tmp_path / "run"
    began = time.time()
    first = start(workdir, text_file, **run)
    while not (workdir / "checkpoints" / "300").exists() and first.poll() is None:
        time.sleep(0.001)
    saved = time.time()
    first.send_signal(signal.SIGSTOP)  # a second and a half in which it does not get to the next checkpoint
    time.sleep(1.5)
    first.send_signal(signal.SIGCONT)
    while not reached(workdir, 8):
        time.sleep(0.001)
    first.kill()
    first.wait()
    killed = time.time()
    time.sleep(2)
    resumed = time.time()
    summary = loop.train(tiny_config(data_path=text_file, **run), workdir)
    ended = time.time()
    assert "resuming   at step 300" in capsys.readouterr().err
    times = times_of(summary)
    # The record is up to a second old, and a process takes a moment to reach its first line.
    assert times["lost"] == pytest.approx(killed - saved, abs=1.5) and times["lost"] > 1
    assert times["down"] == pytest.approx(resumed - killed, abs=2) and times["down"] > 1
    assert summary["seconds"] == pytest.approx(killed - began + ended - resumed, abs=2.5)
    assert sum(times.values()) - times["down"] == pytest.approx(summary["seconds"], abs=0.01)
    for line in lines_of(workdir):
        assert sum(times_of(line).values()) - line["time/down"] == pytest.approx(line["seconds"], abs=0.01)
