"""Runs on a disk that fills up: they continue, log it, and finish unchanged once there is space again."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import BASE, ROOT, overrides, tiny_config

import gptjax
from gptjax.runs import checkpoint_dir, checkpoints, writers
from gptjax.runs.checkpoints import Checkpoints
from gptjax.training import loop

# Tasks that orbax gives up when a save fails.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")

# The command as it is, but that it does not wait as long.
IMPATIENT = """
from gptjax import train
from gptjax.core import arguments
from gptjax.runs import checkpoints
checkpoints.RETRY_SECONDS, checkpoints.LAST_SAVE_SECONDS = 0.1, 1.0
arguments.run(train.main)
"""


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def fill(disk):
    """Fills the disk; returns the file that does so."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def tmpfs_that_fills_up(request, monkeypatch, workdir):
    """Puts the checkpoints on their own disk, which is full from step 40 on until two saves have failed."""
    disk = request.getfixturevalue("small_disk")
    make, save, failed = loop.train_setup, Checkpoints.save, Checkpoints._failed
    failures = []

    def train_setup(*arguments):
        setup = make(*arguments)
        (workdir / "checkpoints").symlink_to(disk)
        return setup

    def save_on_a_full_disk(self, step, *rest):
        if step == 40:
            self.wait()
            fill(disk)
        save(self, step, *rest)

    def make_room(self, error):
        failed(self, error)
        failures.append(self._step)
        if len(failures) == 2:
            (disk / "ballast").unlink()

    monkeypatch.setattr(loop, "train_setup", train_setup)
    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    monkeypatch.setattr(Checkpoints, "_failed", make_room)
    return failures


def errors_as_of_a_full_disk(request, monkeypatch, workdir):
    """Raises the error of a full disk for the first two saves from step 40 on."""
    complete, failures = checkpoint_dir.finalize, []

    def complete_or_fail(directory, step, loss):
        if step >= 40 and len(failures) < 2:
            failures.append(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        complete(directory, step, loss)

    monkeypatch.setattr(checkpoint_dir, "finalize", complete_or_fail)
    return failures


CHANGES = dict(train_steps=120, checkpoint_every_steps=20, checkpoint_keep=1, eval_every_steps=60, log_every_steps=5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_file):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(tiny_config(data_path=text_file, **CHANGES), workdir)
    return workdir


@pytest.mark.parametrize("trouble", [tmpfs_that_fills_up, errors_as_of_a_full_disk])
@pytest.mark.thorough
def test_a_run_whose_checkpoint_does_not_fit_continues_and_finishes(
    undisturbed, tmp_path, text_file, call_train, request, monkeypatch, trouble
):
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoints, "poll", Checkpoints.wait)  # so that each failure is seen at the next step
    failures = trouble(request, monkeypatch, tmp_path / "run")
    result = call_train(tmp_path / "run", data_path=text_file, **CHANGES)
    assert result.code == 0, result.err
    assert failures == [40, 41], "it is tried again at once, not at the next of checkpoint.every_steps"
    told = [line for line in result.err.splitlines() if line.startswith("checkpoint ")]
    assert told == [
        "checkpoint 40 cannot be written: no space left on the disk; make room; the run continues and tries again",
        "checkpoint 42 is written",
    ]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["120"], "neither a half-written one is left nor one that should be gone"
    runs = [gptjax.load(workdir).params for workdir in (tmp_path / "run", undisturbed)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    lines = [writers.read_metrics(workdir) for workdir in (tmp_path / "run", undisturbed)]
    numbers = [[(line["step"], line["train/loss"], line.get("val/loss")) for line in some] for some in lines]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 24


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_with_one_line_and_keeps_older_checkpoints(small_disk, text_file):
    command = [sys.executable, "-c", IMPATIENT, f"--config={BASE}", f"--workdir={small_disk}/run"]
    changes = dict(train_steps=24, checkpoint_every_steps=2, checkpoint_keep=100, data_path=text_file)

    def run():
        return subprocess.run([*command, *overrides(**changes)], cwd=ROOT, capture_output=True, text=True, check=False)

    result = run()
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and lines[-1].startswith("gptjax: no space left on the disk"), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert any(" cannot be written: no space left on the disk" in line for line in lines[:-1])
    assert any(line.startswith("checkpoint 24 is the last one; retrying for") for line in lines)
    saved = sorted(int(p.name) for p in (small_disk / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert saved and saved[-1] < 24, "something was saved before the disk was full"
    assert subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=False).returncode == 0
    result = run()
    assert result.returncode == 0 and f"resuming   at step {saved[-1]}" in result.stderr, result.stderr
    assert json.loads((small_disk / "run" / "summary.json").read_text())["steps"] == 24
    assert all(p.name.isdigit() for p in (small_disk / "run" / "checkpoints").iterdir()), "nothing half-written stays"


def test_metrics_that_do_not_fit_are_written_once_there_is_space(small_disk, capsys):
    writer = writers.JsonLines(small_disk, {}, 0)
    lines = [{"step": step, "x" * 50: 0.5} for step in range(1, 101)]
    writer.write(lines[0])
    ballast = fill(small_disk)
    for line in lines[1:99]:
        writer.write(line)
    assert capsys.readouterr().err.count("no space left on the disk; make room; its lines are kept until it can") == 1
    kept = (small_disk / "metrics.jsonl").read_text()
    assert kept.endswith("}\n"), "no line is cut"
    with pytest.raises(OSError):
        writer.close()
    ballast.unlink()
    writer.write(lines[99])
    writer.close()
    assert writers.read_metrics(small_disk) == lines
