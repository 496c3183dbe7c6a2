"""GPT-2 124M in bfloat16 on one GPU: tokens/s and MFU over batch and context, PyTorch beside the best, and what each
choice is worth. Everything that the README's GPU figures need, by one command; half an hour.

    python experiments/bench/gpu.py

Each line is a run of train_step.py in a process of its own; one that does not fit into memory says so. Writes
results/gpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BFLOAT16 = "train.dtype=bfloat16"
CONTEXTS, BATCHES = (1024, 2048, 4096), (8, 16, 32, 64, 128)
# What is tried on the best batch of 1,024 tokens: changes of the config, and XLA's flags.
CHOICES: dict[str, tuple[list[str], str]] = {
    "plain kernels": (["model.kernels=plain"], ""),
    "scanned layers": (["model.scan_layers=True"], ""),
    "remat dots": (["model.remat=dots"], ""),
    "remat full": (["model.remat=full"], ""),
    "latency hiding": ([], "--xla_gpu_enable_latency_hiding_scheduler=true"),
    "no Triton products": ([], "--xla_gpu_enable_triton_gemm=false"),
}


def run(batch: int, context: int, changes: list[str], flags: str = "", extra: tuple[str, ...] = ()) -> Any:
    """The result of one run, or None where it failed."""
    no_peer = () if extra else ("--peer=none",)
    command = [sys.executable, str(HERE / "train_step.py"), "--shape=gpt2", "--json", f"--batch={batch}"]
    command += [f"--context={context}", "--steps=10", "--device=cuda", *extra, *no_peer, "--set", BFLOAT16, *changes]
    environment = os.environ | {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), flags]).strip()}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def show(name: str, result: Any) -> None:
    """One line of the table."""
    if result is None:
        print(f"{name:32s} does not run or does not fit", flush=True)
        return
    ours = result["sides"]["ours"]
    share, gib = f"{ours['mfu']:.1%}" if "mfu" in ours else "not known", ours["peak_bytes"] / 2**30
    figures = f"{ours['tokens_per_second']:10,.0f} tokens/s  MFU {share:>9s}  {gib:6.1f} GiB"
    print(f"{name:32s} {figures}  attention: {ours['attention']}", flush=True)


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the peer's script; default: train_step.py's")
    given = parser.parse_args().peer
    results: dict[str, Any] = {}
    for context in CONTEXTS:
        for batch in BATCHES:
            name = f"batch {batch}, context {context}"
            results[name] = run(batch, context, [f"model.context={context}"])
            show(name, results[name])
    rates = {
        batch: result["sides"]["ours"]["tokens_per_second"]
        for batch in BATCHES
        if (result := results[f"batch {batch}, context 1024"])
    }
    if not rates:
        sys.exit("bench: no batch ran; python experiments/bench/train_step.py --shape=gpt2 --batch=8 says why")
    best = max(rates, key=lambda batch: rates[batch])
    for name, (changes, flags) in CHOICES.items():
        results[name] = run(best, 1024, changes, flags)
        show(f"{name}, batch {best}", results[name])
    peer = (f"--peer={given}",) if given else ("--rounds=5",)
    results["beside PyTorch"] = run(best, 1024, [], extra=peer)
    show("beside PyTorch", results["beside PyTorch"])
    if results["beside PyTorch"]:
        print(f"ours / compiled PyTorch: {results['beside PyTorch']['ratio']}")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
