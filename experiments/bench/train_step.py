"""Our train step beside PyTorch's, in turns, on the same shapes.

    python experiments/bench/train_step.py --shape=small --peer=torch_gpt2.py --save

Each round runs either in a process of its own, one after the other; figures are medians over rounds. The peer is a
script that takes `train --layers ... --vocab ...` and prints one line of JSON with `tokens_per_second`.
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
DEFAULT_PEER = HERE.parents[2] / "shared" / "peers" / "torch_gpt2.py"

SHAPES = {
    "small": dict(layers=4, heads=4, width=128, context=64, batch=12, vocab=65),
    "middle": dict(layers=6, heads=6, width=384, context=256, batch=8, vocab=65),
    "vocabulary": dict(layers=6, heads=6, width=384, context=256, batch=8, vocab=50304),
}


def ours(shape: dict[str, int], steps: int, dtype: str, kernels: str) -> dict[str, Any]:
    """Figures of our train step on random tokens, in this process."""
    from gptjax import runtime

    runtime.start()
    import jax
    import numpy as np

    from gptjax import config as configs
    from gptjax import models, optim, sharding
    from gptjax.objectives.causal import causal
    from gptjax.training.metrics import flops_per_token
    from gptjax.training.state import initial
    from gptjax.training.step import jitted, train_step

    config = configs.read(str(HERE.parents[1] / "configs" / "base.py"))
    config.model.update(
        layers=shape["layers"], heads=shape["heads"], width=shape["width"], context=shape["context"],
        vocabulary=shape["vocab"], kernels=kernels, activation="gelu",
    )  # fmt: skip
    config.data.batch_size = shape["batch"]
    config = configs.resolve(config)
    model, optimizer, mesh = models.build(config.model, dtype), optim.optimizer(config), sharding.make_mesh()
    ids = np.random.default_rng(0).integers(0, shape["vocab"], (shape["batch"], shape["context"] + 1), np.int32)
    ones = np.ones((shape["batch"], shape["context"]), "f")
    batch = sharding.place({"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": ones}, mesh)
    state = jax.jit(lambda: initial(model, optimizer, 0), out_shardings=sharding.replicated(mesh))()
    flops = flops_per_token(state.params, config.model, shape["context"])
    start = time.perf_counter()
    step = jitted(train_step(causal(model), optimizer, mesh, 0), mesh).lower(state, batch).compile()
    compiled = time.perf_counter() - start
    times = []
    for i in range(steps + 4):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        if i >= 4:
            times.append(time.perf_counter() - start)
    import resource

    rate = shape["batch"] * shape["context"] / statistics.median(times)
    return {
        "tokens_per_second": rate,
        "ms_median": 1e3 * statistics.median(times),
        "flops_per_second": rate * flops,
        "compile_seconds": compiled,
        "step_bytes": step.memory_analysis().temp_size_in_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run(command: list[str]) -> dict[str, Any]:
    """The last line of a command's output, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=30, help="per round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (%(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--peer", type=Path, default=DEFAULT_PEER)
    parser.add_argument("--impl", default="lean", help="of the peer (%(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ours", action="store_true", help="one round of ours alone, in this process")
    flags = parser.parse_args()
    shape = SHAPES[flags.shape]
    if flags.ours:
        print(json.dumps(ours(shape, flags.steps, flags.dtype, flags.kernels)))
        return
    sizes = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    common = [f"--steps={flags.steps}", f"--dtype={flags.dtype}"]
    mine = [sys.executable, __file__, "--ours", f"--shape={flags.shape}", f"--kernels={flags.kernels}", *common]
    peer = [sys.executable, str(flags.peer), "train", f"--impl={flags.impl}", *sizes, *common]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(flags.rounds):
        found["ours"].append(run(mine))
        found["peer"].append(run(peer))
        print({side: round(rounds[-1]["tokens_per_second"]) for side, rounds in found.items()}, file=sys.stderr)
    medians = {
        side: {
            key: statistics.median(r[key] for r in rounds)
            for key in rounds[0]
            if isinstance(rounds[0][key], int | float)
        }
        for side, rounds in found.items()
    }
    result = {
        "ratio": medians["ours"]["tokens_per_second"] / medians["peer"]["tokens_per_second"],
        "shape": shape,
        "dtype": flags.dtype,
        **medians,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "torch")},
    }
    print(json.dumps(result) if flags.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
