"""Traces of training steps: their steps, their format, and interruption."""

import gzip
import json
import time
from contextlib import contextmanager

import pytest
from conftest import tiny_config
from jax.profiler import ProfileData

from gptjax.training import loop
from gptjax.training.monitoring import profiler


def perfetto_events(workdir):
    """The events of each trace of a run, oldest first, as Perfetto reads them."""
    folders = sorted((workdir / "profile" / "plugins" / "profile").iterdir())
    return [json.loads(gzip.open(folder / "perfetto_trace.json.gz").read())["traceEvents"] for folder in folders]


def steps_of(events):
    return [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]


def executions(events):
    """Number of executions of the compiled step, by XLA's count."""
    ops = [event["args"] for event in events if event.get("args", {}).get("hlo_module") == "jit_step"]
    return len({args["run_id"] for args in ops})


def test_a_trace_has_only_the_selected_steps(tmp_path, text_file, capsys):
    loop.train(tiny_config(data_path=text_file, log_profile_steps="3,5"), tmp_path / "run")
    (events,) = perfetto_events(tmp_path / "run")
    assert steps_of(events) == [3, 4, 5] and executions(events) == 3
    (planes,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    names = {event.name for p in ProfileData.from_file(str(planes)).planes for line in p.lines for event in line.events}
    assert "train" in names, "what xprof reads"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("profile ")]
    assert "of steps 3 to 5" in said and f"xprof --logdir={tmp_path / 'run' / 'profile'}`" in said
    assert "ui.perfetto.dev" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8], "no line is lost"


def test_a_trace_may_begin_with_the_first_step_and_end_with_the_last(tmp_path, text_file):
    loop.train(tiny_config(data_path=text_file, log_profile_steps="1,8"), tmp_path / "run")
    (events,) = perfetto_events(tmp_path / "run")
    assert steps_of(events) == list(range(1, 9)) and executions(events) == 8


def test_an_interrupt_ends_the_trace_and_the_resumed_run_traces_the_rest(tmp_path, text_file):
    config = tiny_config(data_path=text_file, log_profile_steps="3,7")

    def interrupt(line):
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="saved at step 4; the same command resumes training"):
        loop.train(config, tmp_path / "run", interrupt)
    (interrupted,) = perfetto_events(tmp_path / "run")
    assert steps_of(interrupted)[:4] == [3, 4, 5, 6]
    time.sleep(1)  # a trace is named by its second
    loop.train(config, tmp_path / "run")
    rest = [steps_of(events) for events in perfetto_events(tmp_path / "run")][1:]
    assert rest == [[5, 6, 7]], "checkpoint 4 is where it goes on"


def test_a_run_that_resumes_after_the_range_traces_nothing(tmp_path):
    with profiler.trace_steps((2, 3), tmp_path, None, 3) as after:
        for step in (4, 5):
            after(step)
    assert not any(tmp_path.iterdir())


def test_a_trace_begins_and_ends_while_nothing_runs(monkeypatch, tmp_path):
    happened = []

    @contextmanager
    def pause():
        happened.append("waited")
        yield
        happened.append("went on")

    monkeypatch.setattr(profiler, "start", lambda folder: happened.append("start"))
    monkeypatch.setattr(profiler, "stop", lambda folder, *steps: happened.append(f"stop {steps}"))
    with profiler.trace_steps((2, 3), tmp_path, pause, 0) as after:
        for step in (1, 2, 3, 4, 5):
            happened.append(step)
            after(step)
    begin, end = ["waited", "start", "went on"], ["waited", "stop (2, 3)", "went on"]
    assert happened == [1, *begin, 2, 3, *end, 4, 5]
