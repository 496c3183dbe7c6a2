"""Times a sweep's trials as one program beside the same trials one after the other, all that a person waits for.

    python experiments/bench/population.py --data=input.txt
    python experiments/bench/population.py --members=4 --steps=50 --rounds=1 --json

Both sides are experiments/sweep.py on configs/shakespeare.py with so many learning rates, from the process's start to
its end: data, compiling, steps, checkpoints, evaluations, samples and plots. Each has a compilation cache of its own,
empty at first. Sides take turns; ratios are medians over rounds. The last line of --json has `ratio`, one program by
one after the other, and with --out it goes to a file.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptjax.core import console
from gptjax.core.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
SIDES = {"one after the other": (), "one program": ("--vmap",)}


def seconds(side: str, flags: argparse.Namespace) -> tuple[float, list[float]]:
    """Of a whole sweep; and its trials' held-out losses."""
    rates = ",".join(f"{1e-3 * 1.3**i:.5f}" for i in range(flags.members))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "experiments/sweep.py", "--config=configs/shakespeare.py", "--json"]
        command += [f"--set=optimizer.learning_rate={rates}", f"--workdir={folder}/sweep", *SIDES[side]]
        command += [f"--config.data.path={flags.data}", f"--config.train.steps={flags.steps}"]
        command += [f"--config.eval.every_steps={flags.steps}", f"--config.checkpoint.every_steps={flags.steps}"]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla", "PYTHONPATH": str(ROOT)}
        begun = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
        spent = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(done.stderr)
    trials = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    losses = {one["values"]["optimizer.learning_rate"]: one["loss"] for one in trials}
    return spent, [losses[rate] for rate in sorted(losses)]


def main() -> None:
    """Times both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
    parser.add_argument("--data", default=str(default), help="a text")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="of each trial")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file that the result is written to")
    parser.add_argument("--json", action="store_true", help="print objects alone")
    flags = parser.parse_args()
    rounds, apart = [], 0.0
    for number in range(flags.rounds):
        spent, losses = {}, []
        for side in SIDES:
            console.say(f"round {number + 1}: {flags.members} trials of {flags.steps} steps, {side}")
            spent[side], own = seconds(side, flags)
            losses.append(own)
        apart = max(apart, *(abs(a - b) for a, b in zip(*losses, strict=True)))
        rounds.append(spent)
        console.say(f"round {number + 1}: {', '.join(f'{side} {value:.0f} s' for side, value in spent.items())}")
    ratios = [one["one program"] / one["one after the other"] for one in rounds]
    found = {
        "members": flags.members, "steps": flags.steps, "rounds": rounds, "ratios": ratios,
        "ratio": statistics.median(ratios), "losses_apart": apart, "processors": os.cpu_count(),
        "machine": platform.machine(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if flags.out:
        write_atomic(flags.out, json.dumps(found, indent=1) + "\n")
    if flags.json:
        print(json.dumps(found))
    else:
        print(f"one program takes {found['ratio']:.2f} of the time; held-out losses differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
