"""A tiny run in a process of its own, which tests interrupt, and what it leaves."""

import json
import subprocess
import sys

from conftest import BASE, ROOT, overrides

import gptjax


def start(workdir, text, **changes):
    command = [sys.executable, "-m", "gptjax.train", f"--config={BASE}", f"--workdir={workdir}"]
    settings = dict(data_path=text, train_steps=600, checkpoint_every_steps=37, log_every_steps=1, model_dropout=0.1)
    settings |= dict(eval_every_steps=200) | changes
    return subprocess.Popen(
        [*command, *overrides(**settings)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def reached(workdir, step):
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= step


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def params_of(workdir):
    return gptjax.load(workdir).params
