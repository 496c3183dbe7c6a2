"""The watchdog: a process that hangs ends and says where it hung; one that gets on does not."""

import os
import subprocess
import sys
import time

from conftest import BASE, ROOT, overrides

from gptjax.training.monitoring import watchdog

HANGS_AT_STEP_6 = """
import sys, time
from gptjax import train
from gptjax.core import arguments
from gptjax.data import batches

fetch = batches.Batches.__getitem__

def planted(self, step):
    while step == 5:
        time.sleep(1)
    return fetch(self, step)

batches.Batches.__getitem__ = planted
arguments.run(train.main)
"""
HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from gptjax.training import watchdog

def hold():
    ctypes.PyDLL(None).sleep(60)  # as a C extension that hangs without giving Python's lock back

with watchdog.watched(0.01, Path(sys.argv[1]), lambda: "step"):
    hold()
"""


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_hung_step_dumps_all_stacks_and_ends(tmp_path, text_file):
    flags = overrides(data_path=text_file, train_hang_minutes=0.15)
    done = run(HANGS_AT_STEP_6, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 1
    assert "gptjax: no progress for 0.15 minutes (train.hang_minutes), at data; the stacks are in" in done.stderr
    kept = (tmp_path / "run" / "hang.txt").read_text()
    for stacks in (done.stderr, kept):
        assert "in planted" in stacks and "in take_steps" in stacks, "the thread that fetches, and the one that waits"
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_what_holds_pythons_lock_is_ended_too(tmp_path):
    start = time.monotonic()
    done = run(HOLDS_THE_LOCK, tmp_path / "hang.txt")
    assert done.returncode == 1 and "in hold" in done.stderr and time.monotonic() - start < 30


def test_progress_keeps_a_process_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(AssertionError))
    with watchdog.watched(0.01, tmp_path / "hang.txt", str) as beat:  # 0.6 s
        for _ in range(15):
            time.sleep(0.1)
            beat()
    time.sleep(0.7)  # nothing goes off once it is over
    assert not (tmp_path / "hang.txt").exists()
