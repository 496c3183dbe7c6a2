"""Times one training step: ours, PyTorch's, and ours with other settings, in turns on the same shape.

    python experiments/bench/train_step.py --shape=small
    python experiments/bench/train_step.py --shape=middle --set train.dtype=bfloat16 --beside train.dtype=float32
    python experiments/bench/train_step.py --shape=gpt2 --batch=32 --set train.dtype=bfloat16     # on a GPU

Each round runs a few steps of each side, one side after the other; a figure is the median over rounds, and a ratio is
the median of the rounds' ratios. Ours stay alive between rounds. The peer is a script that takes `train --layers ...`
and prints one line of JSON with `tokens_per_second`; it starts anew in each round and its start is not timed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
PEER = REPO.parent / "shared" / "peers" / "torch_gpt2.py"

SHAPES = {
    "tiny": dict(layers=1, heads=2, width=32, context=32, batch=2, vocab=65),
    "small": dict(layers=4, heads=4, width=128, context=64, batch=12, vocab=65),
    "middle": dict(layers=6, heads=6, width=384, context=256, batch=8, vocab=65),
    "vocabulary": dict(layers=6, heads=6, width=384, context=256, batch=8, vocab=50304),
    "gpt2": dict(layers=12, heads=12, width=768, context=1024, batch=32, vocab=50257),
}

UNTIMED = 2  # steps of ours at the start of a turn; the peer has its own

Figures = dict[str, Any]


def settings(changes: list[str]) -> list[str]:
    """["--config.KEY=VALUE", ...] from ["KEY=VALUE", ...]."""
    return [f"--config.{change}" for change in changes]


def work(shape: dict[str, int], changes: list[str]) -> None:
    """A side of ours: compiles the step, prints its figures, and for each number read runs that many steps."""
    from gptjax.core import runtime

    runtime.start()
    import jax
    import numpy as np

    from gptjax import models, objectives, optim, sharding
    from gptjax.core import cpu_idle
    from gptjax.models import kernels
    from gptjax.runs import config as configs
    from gptjax.runs.train_state import init_state
    from gptjax.training import step as steps
    from gptjax.training.monitoring.metrics import MFU_CONVENTION, flops_per_token, mfu

    config = configs.read(str(REPO / "configs" / "base.py"), settings(changes))
    config.model.update({key: shape[key] for key in ("layers", "heads", "width", "context")})
    config.model.vocabulary, config.data.batch_size = shape["vocab"], shape["batch"]
    config = configs.resolve(config)
    model, optimizer = models.build(config.model, config.train.dtype), optim.optimizer(config)
    mesh = sharding.make_mesh()
    B, T = shape["batch"], shape["context"]
    ids = np.random.default_rng(0).integers(0, shape["vocab"], (B, T + 1), np.int32)
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((B, T), np.float32)}
    batch = sharding.place_batch(batch, mesh)
    state = jax.jit(lambda: init_state(model, optimizer, 0), out_shardings=sharding.replicated(mesh))()
    flops = flops_per_token(state.params, config.model, T)
    began = time.perf_counter()
    objective = objectives.loss(config, model)
    step = steps.make_train_step(config, objective, optimizer, mesh, state).lower(state, batch).compile()
    facts = {
        "compile_seconds": time.perf_counter() - began,
        "attention": kernels.attention_plan(model.config, config.train.dtype),
        "flops_per_token": flops,
        "step_temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "device": jax.devices()[0].device_kind,
        "mfu_convention": MFU_CONVENTION,
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        times = []
        with cpu_idle.keep_awake(jax.default_backend() == "cpu"):
            for _ in range(UNTIMED + int(line)):
                start = time.perf_counter()
                state, said = step(state, batch)
                float(said["loss"])
                times.append(time.perf_counter() - start)
        seconds = statistics.median(times[UNTIMED:])
        rate = B * T / seconds
        found = {
            "tokens_per_second": rate,
            "ms_median": 1e3 * seconds,
            "flops_per_second": rate * flops,
            "mfu": mfu(rate, flops, jax.devices()[0].device_kind, mesh.size),
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(found), flush=True)


def peak_bytes() -> int:
    """The most memory in use so far: of the device where it tells, else of this process."""
    import resource

    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ours:
    """A bench's own process for its side of ours, which waits to be told how many steps to run."""

    def __init__(self, script: str, work: dict[str, Any]) -> None:
        command = [sys.executable, script, "--work", json.dumps(work)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # a GPU is shared with the peer
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd=REPO, env=environment
        )
        self.facts = self._read()
        self.run(1)

    def _read(self) -> Figures:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            sys.exit(f"bench: our own side ended with code {self.process.wait()}; its last words are above")
        return json.loads(line)

    def run(self, steps: int) -> Figures:
        """Figures of so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._read()


class Peer:
    """PyTorch's side."""

    def __init__(self, script: Path, what: list[str], shape: dict[str, int], dtype: str, device: str) -> None:
        sizes = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        on = ["--device", "cuda", "--compile"] if device == "cuda" else []
        self.command = [sys.executable, str(script), *what, "--dtype", dtype, *sizes, *on]
        self.facts: Figures = {}

    def run(self, steps: int) -> Figures:
        """Figures of so many steps, in a new process."""
        process = subprocess.Popen([*self.command, "--steps", str(steps)], stdout=subprocess.PIPE, encoding="utf-8")
        assert process.stdout is not None
        lines = process.stdout.read().strip().splitlines()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"bench: {' '.join(self.command)} ended with code {process.returncode}")
        found = json.loads(lines[-1])
        self.facts = {"impl": found["impl"]}
        names = ("tokens_per_second", "ms_median")
        return {name: found[name] for name in names} | {"peak_bytes": used.ru_maxrss * 1024}


def measure(sides: dict[str, Any], rounds: int, steps: int) -> dict[str, list[Figures]]:
    """Figures of each round of each side."""
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            found[name].append(side.run(steps))
        rates = ", ".join(f"{name} {rows[-1]['tokens_per_second']:,.0f}" for name, rows in found.items())
        print(f"round {number + 1} of {rounds}: {rates} tokens/s", file=sys.stderr)
    return found


def medians(rows: list[Figures]) -> Figures:
    """The median of each figure; of memory the most."""
    known = {key: [row[key] for row in rows] for key in rows[0] if rows[0][key] is not None}
    return {key: max(values) if key == "peak_bytes" else statistics.median(values) for key, values in known.items()}


def ratio(ours: list[Figures], theirs: list[Figures]) -> float:
    """The median over rounds of our tokens/s by theirs."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)


def machine() -> str:
    """What this runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of what is timed."""
    known = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version()} | known


def readable(result: Figures) -> str:
    """The result as a table for a person."""
    rows = [f"{'':10s} {'tokens/s':>10s} {'ms a step':>10s} {'GFLOP/s':>9s} {'peak MiB':>9s} {'compile s':>9s}"]
    for name, side in result["sides"].items():
        flops, compiled = side.get("flops_per_second", 0) / 1e9, side.get("compile_seconds", 0)
        rows.append(
            f"{name:10s} {side['tokens_per_second']:10,.0f} {side['ms_median']:10.1f} {flops or float('nan'):9,.0f} "
            f"{side['peak_bytes'] / 2**20:9,.0f} {compiled or float('nan'):9.1f}"
        )
    rows += [f"ours / {name}: {value:.3f} tokens/s, {result['memory_ratios'][name]:.2f} of its peak memory"
             for name, value in result["ratios"].items()]  # fmt: skip
    ours = result["sides"]["ours"]
    share = f"{ours['mfu']:.1%}" if "mfu" in ours else f"not known on {ours['device']}"
    return "\n".join([*rows, f"attention: {ours['attention']}", f"MFU {share}: {ours['mfu_convention']}"])


def main() -> None:
    """Measures as the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name in ("batch", "context"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--steps", type=int, default=20, help="of each side in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    parser.add_argument("--beside", nargs="*", metavar="KEY=VALUE", help="ours once more, with these changes")
    parser.add_argument("--peer", type=Path, default=PEER, help="the peer's script (%(default)s)")
    parser.add_argument("--impl", default="lean", choices=["lean", "hf"], help="of the peer (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the peer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one object and nothing else on stdout")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(**flags.work)
        return
    given = {name: getattr(flags, name) for name in ("batch", "context") if getattr(flags, name)}
    shape = SHAPES[flags.shape] | given
    dtype = next((change.split("=")[1] for change in flags.set if change.startswith("train.dtype=")), "float32")
    sides: dict[str, Any] = {"ours": Ours(__file__, {"shape": shape, "changes": flags.set})}
    if flags.beside is not None:
        sides["beside"] = Ours(__file__, {"shape": shape, "changes": flags.beside})
    if flags.peer.is_file():
        sides["peer"] = Peer(flags.peer, ["train", "--impl", flags.impl], shape, dtype, flags.device)
    else:
        print(f"bench: there is no {flags.peer}, so no peer (--peer=PATH)", file=sys.stderr)
    found = measure(sides, flags.rounds, flags.steps)
    summary = {name: medians(rows) | sides[name].facts for name, rows in found.items()}
    others = [name for name in found if name != "ours"]
    ratios = {name: ratio(found["ours"], found[name]) for name in others}
    result = {
        "ratio": ratios.get("peer"),
        "ratios": ratios,
        "memory_ratios": {name: summary["ours"]["peak_bytes"] / summary[name]["peak_bytes"] for name in others},
        "shape": shape,
        "sides": summary,
        "rounds": {name: [row["tokens_per_second"] for row in rows] for name, rows in found.items()},
        "settings": {"ours": flags.set, "beside": flags.beside},
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(
            ["python experiments/bench/train_step.py", *(a for a in sys.argv[1:] if "--peer" not in a)]
        ),
    }
    if flags.save:
        (HERE / "results" / f"{flags.save}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if flags.json else readable(result))


if __name__ == "__main__":
    main()
