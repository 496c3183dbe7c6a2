"""Kills a run with SIGKILL at random instants, again and again, and compares its end with an uninterrupted run's.

    python experiments/bench/torture.py
    python experiments/bench/torture.py --rounds=5 --seed=1 --json

Each round starts the command and kills it: while it starts, at a random step and instant of training, or, once the
folder of a checkpoint that is being written has appeared, within the time that writing takes. What is left in the end
must be the same to the byte: all arrays of the last checkpoint, the loss of every step, the held-out loss, the sample.
"""

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_step import machine, versions

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
STEPS, EVERY = 2000, 40
SETTINGS = {
    "data.path": argparse.__file__,  # some text that every machine has
    "data.tokenizer": "bytes",
    "data.batch_size": 8,
    "model.layers": 2,
    "model.width": 64,
    "model.context": 32,
    "model.dropout": 0.1,
    "train.steps": STEPS,
    "checkpoint.every_steps": EVERY,
    "eval.every_steps": 100,
    "log.every_steps": 1,
    "sample.max_tokens": 50,
}
SLOW = 120.0  # seconds after which a round that does not get where it should is given up

Figures = dict[str, Any]


def start(workdir: Path) -> subprocess.Popen[str]:
    """The command, begun."""
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "gptjax.train", "--config=configs/base.py", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")


def step_of(workdir: Path) -> int:
    """The newest step in metrics.jsonl; 0 where there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().rsplit(b"\n", 2) if path.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def being_written(workdir: Path) -> list[str]:
    """Checkpoints of which not all is there yet."""
    folder = workdir / "checkpoints"
    return [name for name in os.listdir(folder) if not name.isdigit()] if folder.exists() else []


def wait_for(condition: Callable[[], Any], running: subprocess.Popen[str]) -> bool:
    """Waits until it holds; False where the process ended before."""
    end = time.monotonic() + SLOW
    while not condition():
        if running.poll() is not None:
            return False
        if time.monotonic() > end:
            running.kill()
            sys.exit("bench: a round does not get on; its process has been killed")
        time.sleep(0.0005)
    return True


def one_round(workdir: Path, rng: random.Random, left: int) -> str:
    """Starts the run and kills it; where that was.

    Args:
      workdir: the run's.
      rng: decides when.
      left: rounds to come, this one included, over which what is left of the training is spread.
    """
    aim = rng.choices(["start", "step", "save"], [1, 3, 3])[0]
    before, began = step_of(workdir), time.time()
    running = start(workdir)
    if aim == "start":
        time.sleep(rng.uniform(0, 6))
    else:
        target = before + rng.uniform(0, 2 * (STEPS - before) / (left + 1))
        if wait_for(lambda: _trained(workdir, began, target), running):
            if aim == "save" and not wait_for(lambda: being_written(workdir), running):
                aim = "step"
            time.sleep(rng.uniform(0, 0.03))
    running.kill()
    _, err = running.communicate()
    if running.returncode > 0:
        sys.exit(f"bench: the run ended by itself with code {running.returncode}:\n{err}")
    if running.returncode == 0:
        return "finished"
    if "first step" not in err:
        return "before the first step"  # whatever the process before it left
    return "while a checkpoint was written" if being_written(workdir) else "in training"


def _trained(workdir: Path, began: float, target: float) -> bool:
    """Whether a process has trained beyond the target; it writes metrics.jsonl anew before its first step."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > began and step_of(workdir) >= target


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by name."""
    import jax

    from gptjax import models, optim, sharding
    from gptjax.runs.checkpoints import Checkpoints, shapes_on
    from gptjax.runs.directory import read_config
    from gptjax.runs.train_state import init_state

    config = read_config(workdir)
    model = models.build(config.model, config.train.dtype)
    shapes = jax.eval_shape(lambda: init_state(model, optim.optimizer(config), config.seed))
    state = Checkpoints(workdir).restore(shapes_on(shapes, sharding.replicated(sharding.make_mesh())))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def results(workdir: Path) -> dict[str, bytes]:
    """What a run ends with beside its arrays: the losses as they are written, and the sample."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("step", "train/loss", "grad_norm", "val/loss")
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return {
        "metrics": json.dumps([{name: line.get(name) for name in names} for line in lines]).encode(),
        "summary": json.dumps([summary["val_loss"], summary["val_bits_per_byte"]]).encode(),
        "sample": (workdir / "samples.txt").read_bytes(),
    }


def compare(one: Path, other: Path) -> Figures:
    """Bytes compared and bytes that differ; where sizes differ, all of the longer count."""
    pairs = []
    for read in (arrays, results):
        a, b = read(one), read(other)
        pairs += [(name, _bytes(a.get(name)), _bytes(b.get(name))) for name in sorted(a.keys() | b.keys())]
    differing = {
        name: int((x != y).sum()) if x.size == y.size else max(x.size, y.size)
        for name, x, y in pairs
        if x.size != y.size or (x != y).any()
    }
    return {
        "bytes_compared": sum(max(x.size, y.size) for _, x, y in pairs),
        "bytes_different": sum(differing.values()),
        "differing": differing,
    }


def _bytes(value: np.ndarray | bytes | None) -> np.ndarray:
    raw = value.tobytes() if isinstance(value, np.ndarray) else value or b""
    return np.frombuffer(raw, np.uint8)


def finish(workdir: Path) -> float:
    """Lets the run come to its end; seconds it took."""
    began = time.monotonic()
    running = start(workdir)
    _, err = running.communicate()
    if running.returncode:
        sys.exit(f"bench: the run ended with code {running.returncode}:\n{err}")
    return time.monotonic() - began


def torture(folder: Path, rounds: int, seed: int) -> Figures:
    """The figures of so many kills."""
    whole, tortured = folder / "whole", folder / "tortured"
    seconds, rng, began = finish(whole), random.Random(seed), time.monotonic()
    print(f"uninterrupted: {seconds:.0f} s", file=sys.stderr)
    kills: collections.Counter[str] = collections.Counter()
    for number in range(rounds):
        where = one_round(tortured, rng, rounds - number)
        kills[where] += 1
        print(f"round {number + 1} of {rounds}: killed {where}, step {step_of(tortured):,}", file=sys.stderr)
    finish(tortured)
    wall = time.monotonic() - began
    found = compare(whole, tortured)
    summary = json.loads((tortured / "summary.json").read_text(encoding="utf-8"))
    times = {name: value for name, value in summary.items() if name.startswith("time/")}
    return {
        "ratio": None,
        "rounds": rounds,
        "seed": seed,
        "kills": dict(kills),
        **found,
        "steps": STEPS,
        "seconds": {"uninterrupted": seconds, "tortured": wall},
        "accounted_for": sum(times.values()) / wall,
        "tortured_accounts": times | {"goodput": summary["goodput"]},
    }


def main() -> None:
    """Kills as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one object and nothing else on stdout")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        result = torture(folder, flags.rounds, flags.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python experiments/bench/torture.py", *sys.argv[1:]]),
    }
    if flags.save:
        (HERE / "results" / f"{flags.save}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if flags.json else readable(result))
    if result["bytes_different"]:
        sys.exit(1)


def readable(result: Figures) -> str:
    """The result for a person."""
    kills = ", ".join(f"{count} {where}" for where, count in result["kills"].items())
    return (
        f"{result['rounds']} kills: {kills}\n"
        f"{result['bytes_different']:,} of {result['bytes_compared']:,} bytes differ from the uninterrupted run's\n"
        f"{result['accounted_for']:.1%} of {result['seconds']['tortured']:,.0f} s are in the run's own accounts"
    )


if __name__ == "__main__":
    main()
