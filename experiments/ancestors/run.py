"""The decoder beside its ancestors: RNN, LSTM, GPT-1's block, GPT-2's, today's, each with as many parameters, on the
same tokens by the same schedule. Trains one after the other; writes results.json and loss.png next to this file.

python experiments/ancestors/run.py --data=wikitext2/train.txt
python experiments/ancestors/run.py --data=train.txt --only=lstm,modern --out=/tmp/them --config.train.steps=200

Runs that are there already are not trained again: cut short, the same command goes on.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

# What each is, on top of configs/base.py; widths follow from the parameters.
ANCESTORS: dict[str, dict[str, Any]] = {
    "rnn": {"arch": "recurrent", "cell": "rnn", "layers": 2, "use_bias": True, "init_std": 0.1},
    "lstm": {"arch": "recurrent", "cell": "lstm", "layers": 2, "use_bias": True, "init_std": 0.1},
    "gpt1": {"norm_position": "post", "use_bias": True, "residual_init": "plain"},
    "gpt2": {"use_bias": True},
    "modern": {
        "positions": "rotary", "norm": "rmsnorm", "qk_norm": "head", "value_residual": True, "activation": "relu2",
        "residual_init": "zero", "logit_softcap": 15.0,
    },
}  # fmt: skip
SETTINGS = {
    "model.context": 128,
    "data.tokenizer": "bpe:4096",
    "data.batch_size": 32,
    "data.held_out": 0.05,
    "optimizer.learning_rate": 2e-3,
    "schedule.warmup_steps": 100,
    "train.steps": 700,
    "eval.every_steps": 50,
    "checkpoint.every_steps": 250,
    "sample.prompt": "The",
}
STEP = 16  # what widths are multiples of


def flags_of(model: dict[str, Any], width: int, data: Path, overrides: list[str]) -> list[str]:
    """Flags of the recipe for one of them."""
    keys = SETTINGS | {f"model.{key}": value for key, value in (model | {"width": width}).items()}
    flags = [f"--config.{key}={value}" for key, value in (keys | {"data.path": data}).items()]
    return [f"--config={ROOT / 'configs' / 'base.py'}", *flags, *overrides]


def parameters(model: dict[str, Any], width: int, data: Path, overrides: list[str]) -> int:
    """How many it has at that width; nothing is allocated."""
    import jax

    from gptjax import models
    from gptjax.runs import config as configs

    recipe, *flags = flags_of(model, width, data, overrides)
    config = configs.resolve(configs.read(recipe.removeprefix("--config="), flags))
    config = configs.with_vocabulary(config, int(config.data.tokenizer.removeprefix("bpe:")))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models.shapes(models.build(config.model))))


def widths(like: str, width: int, data: Path, overrides: list[str]) -> dict[str, int]:
    """The width of each at which it has as many parameters as `like` has at `width`, as nearly as widths allow."""
    wanted = parameters(ANCESTORS[like], width, data, overrides)

    def nearest(model: dict[str, Any]) -> int:
        tried = range(STEP, 4 * width + 1, STEP)
        return min(tried, key=lambda own: abs(parameters(model, own, data, overrides) - wanted))

    return {name: nearest(model) for name, model in ANCESTORS.items()}


def train(name: str, width: int, data: Path, workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains one of them as a process of its own, or finds it finished; its figures."""
    flags = flags_of(ANCESTORS[name], width, data, overrides)
    command = [sys.executable, "-m", "gptjax.train", *flags, f"--workdir={workdir}", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "name": name,
        "width": width,
        "parameters": summary["parameters"],
        "loss": round(summary["val_loss"], 4),
        "perplexity": round(math.exp(summary["val_loss"]), 2),
        "bits_per_byte": round(summary["val_bits_per_byte"], 4),
        "tokens_per_second": round(summary["tokens_per_second"]),
        "minutes": round(summary["seconds"] / 60, 1),
        "looks": [[line["step"], round(line["val/loss"], 4)] for line in lines if "val/loss" in line],
    }


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    rows = [
        f"| {one['name']} | {one['width']} | {one['parameters']:,} | {one['loss']:.3f} | {one['perplexity']:.1f} "
        f"| {one['bits_per_byte']:.3f} | {one['tokens_per_second']:,} | {one['minutes']} |"
        for one in found
    ]
    columns = ["", "width", "parameters", "held-out loss", "perplexity", "bits per byte", "tokens/s", "minutes"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    return "\n".join([head, *rows])


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss by step, a line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for one in found:
        steps, losses = zip(*one["looks"], strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label=f"{one['name']} {one['loss']:.3f}")
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)", xlim=(0, None))
    axes.set_title(
        f"as many parameters ({found[0]['parameters'] / 1e6:.1f}M), the same tokens and schedule", fontsize=11
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains them all and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/wikitext2/train.txt")
    parser.add_argument("--only", default=",".join(ANCESTORS), help="some of them")
    parser.add_argument("--width", type=int, default=128, help="of GPT-2's")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ancestors", help="where the runs go")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and loss.png go")
    flags, overrides = parser.parse_known_args()
    data = flags.data.resolve()
    chosen, found = widths("gpt2", flags.width, data, overrides), []
    flags.out.mkdir(parents=True, exist_ok=True)
    for name in flags.only.split(","):
        found.append(train(name, chosen[name], data, flags.runs / name, overrides))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "looks"}), flush=True)
        (flags.out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        plot(found, flags.out / "loss.png")
    print(table(found))


if __name__ == "__main__":
    main()
