"""The speed-run over seeds, each beside a PyTorch peer on the same machine: writes results.json next to this file.

python experiments/speedrun/run.py --data=input.txt
python experiments/speedrun/run.py --data=input.txt --seeds=0,1 --out=/tmp/results.json --config.model.qk_norm=none

Before each of our runs the peer is timed for some seconds. What it would need is the tokens of nanoGPT's CPU recipe
divided by the median of its tokens per second; its start, its compiler and its evaluations are not counted. All of
ours is, from the start of the process with an empty compilation cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = 1.898  # nanoGPT's own recipe, over the whole validation tenth: see experiments/shakespeare
PEER_TOKENS = 2000 * 12 * 64  # of that recipe


def peer_rate(peer: Path, steps: int) -> float | None:
    """Tokens per second of the peer's train step at its default shape; None where there is no peer."""
    if not peer.exists():
        return None
    command = [sys.executable, str(peer), "train", f"--steps={steps}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]


def one_run(data: Path, seed: int, overrides: list[str], cache: Path, workdir: Path) -> dict[str, Any]:
    """Trains once as a process of its own: loss, the summary's seconds, and the command's wall time."""
    command = [sys.executable, "-m", "gptjax.train", f"--config={ROOT / 'configs' / 'speedrun.py'}"]
    command += [f"--config.data.path={data}", f"--config.seed={seed}", f"--workdir={workdir}", "--json", *overrides]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start, before = time.monotonic(), os.times()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    wall, after = time.monotonic() - start, os.times()
    summary = json.loads(done.stdout.splitlines()[-1])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    figures = {"loss": summary["val_loss"], "seconds": summary["seconds"], "wall_seconds": wall, "cpu_seconds": cpu}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    """Runs every seed, cold and once warm, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/tinyshakespeare/input.txt")
    parser.add_argument("--peer", type=Path, default=ROOT.parent / "shared/peers/torch_gpt2.py")
    parser.add_argument("--peer_steps", type=int, default=100, help="steps of the peer before each of our runs")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--warm", action="store_true", help="once more at the end, with the programs of the last run")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    flags, overrides = parser.parse_known_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in [int(seed) for seed in flags.seeds.split(",")]:
            cache = Path(folder) / f"cache_{seed}"
            peer = peer_rate(flags.peer, flags.peer_steps)
            figures = one_run(flags.data.resolve(), seed, overrides, cache, Path(folder) / f"run_{seed}")
            runs.append({"seed": seed, "cache": "cold", "peer_tokens_per_second": peer, **figures})
            print(json.dumps(runs[-1]), flush=True)
            flags.out.write_text(json.dumps(results(runs), indent=2) + "\n", encoding="utf-8")
        if flags.warm:
            figures = one_run(flags.data.resolve(), seed, overrides, cache, Path(folder) / "warm")
            runs.append({"seed": seed, "cache": "warm", "peer_tokens_per_second": None, **figures})
    flags.out.write_text(json.dumps(results(runs), indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results(runs).items() if key != "runs"}))


def results(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs and what follows from the cold ones: whether each reached the target, and the time beside the peer's."""
    cold = [run for run in runs if run["cache"] == "cold"]
    rates = [run["peer_tokens_per_second"] for run in cold if run["peer_tokens_per_second"]]
    peer = PEER_TOKENS / statistics.median(rates) if rates else None
    wall = statistics.median(run["wall_seconds"] for run in cold)
    return {
        "target": TARGET,
        "reached": sum(run["loss"] <= TARGET for run in cold),
        "loss_mean": statistics.mean(run["loss"] for run in cold),
        "loss_max": max(run["loss"] for run in cold),
        "wall_seconds_median": wall,
        "peer_seconds": peer,
        "ratio": peer and wall / peer,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
