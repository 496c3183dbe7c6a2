"""Messages and progress bars, with and without a terminal."""

import os
import pty
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, overrides

from gptjax.core import console


@pytest.mark.parametrize("seconds, shown", [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (7265, "2:01:05")])
def test_durations(seconds, shown):
    assert console.duration(seconds) == shown


def test_without_a_terminal_there_are_plain_lines_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    clock = iter(range(100))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.bar("training", 10, done=4) as advance:
        advance(1, step="5/10", loss="2.5")
        advance(1, loss="2.4")
    assert capsys.readouterr().err.splitlines() == [
        "training  50%  step 5/10  loss 2.5  0:05 left",
        "training  60%  step 5/10  loss 2.4  0:04 left",
    ]


def test_nothing_is_printed_for_what_takes_no_time(capsys):
    with console.bar("reading", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(tmp_path, text_file):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gptjax.train", f"--config={BASE}", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    running = subprocess.Popen(
        [*command, *overrides(data_path=text_file, train_steps=400)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the other side has closed
            break
    assert running.wait() == 0
    shown = seen.decode()
    for part in ("━", "loss 5.", "tokens/s ", "left", "step 4"):
        assert part in shown, part
