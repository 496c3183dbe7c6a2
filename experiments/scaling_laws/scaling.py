"""Scaling laws: a ladder of sizes and budgets, fits of what it gives, and a largest run that is predicted first.

python experiments/scaling_laws/scaling.py --plan
python experiments/scaling_laws/scaling.py
python experiments/scaling_laws/scaling.py --scale=gpu --data="text/*.txt" --out=runs/laws_gpu
python experiments/scaling_laws/scaling.py --redraw

Runs of one budget of FLOPs divide it between parameters and tokens. When all but the largest are finished, its loss is
predicted and written to prediction.json, which is not changed again; then it is trained. What is finished is not done
again. Writes results.json and laws.png to --out. Keys of the config go as to gptjax.train (--config.KEY=VALUE).
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fits
import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import arguments, console, runtime
from gptjax.core.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BOOTSTRAPS = 200


class Scale(NamedTuple):
    """What a ladder is made of."""

    sizes: tuple[tuple[int, int], ...]  # layers and width
    budgets: tuple[float, ...]  # FLOPs
    held_out: tuple[int, int, float]  # layers, width and budget of the run that is predicted
    tokenizer: str
    vocabulary: int
    context: int
    batch_size: int
    rate: float  # the learning rate
    beta2: float  # of Adam; the fewer tokens a batch has, the nearer to 1 (arXiv 2507.07101)
    dtype: str
    steps: tuple[int, int]  # the fewest and the most that a run may have
    flops_per_second: float  # what training reaches, for the plan


SCALES = {
    "cpu": Scale(
        sizes=((1, 32), (2, 48), (2, 64), (3, 80), (3, 96), (4, 128), (5, 160)),
        budgets=(3e12, 1e13, 3e13),
        held_out=(4, 144, 1e14),
        tokenizer="bpe:1024", vocabulary=1024, context=128, batch_size=4, rate=4e-3, beta2=0.999, dtype="float32",
        steps=(1_500, 52_000), flops_per_second=80e9,
    ),
    "gpu": Scale(
        sizes=((4, 256), (6, 384), (8, 512), (10, 640), (12, 768), (16, 1024)),
        budgets=(1e17, 3e17, 1e18),
        held_out=(18, 1152, 6e18),
        tokenizer="bpe:16384", vocabulary=16_384, context=1024, batch_size=64, rate=1e-3, beta2=0.95, dtype="bfloat16",
        steps=(300, 60_000), flops_per_second=3e14,
    ),
}  # fmt: skip


class Rung(NamedTuple):
    """A run of the ladder."""

    layers: int
    width: int
    budget: float
    parameters: int
    steps: int
    tokens: int
    flops: float  # as gptjax.training.monitoring.metrics.flops_per_token counts them
    held_out: bool

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.budget:.0e}-l{self.layers}-d{self.width}"


def ladder(name: str) -> list[Rung]:
    """The runs of a scale: for each budget the sizes that can spend it in as many steps as it may; the largest last."""
    scale = SCALES[name]
    found = [rung(scale, *size, budget, False) for budget in scale.budgets for size in scale.sizes]
    least, most = scale.steps
    return [one for one in found if least <= one.steps <= most] + [rung(scale, *scale.held_out, True)]


def heads(width: int) -> int:
    """Of 32 numbers each, or a little more."""
    return max(width // 32, 1)


def rung(scale: Scale, layers: int, width: int, budget: float, held_out: bool) -> Rung:
    """A run of that size with so many steps as spend the budget."""
    norms = (2 * layers + 1) * width + 2 * layers * (width // heads(width))  # of the stream, of queries and keys
    parameters = 12 * layers * width**2 + norms + scale.vocabulary * width  # one table, tied
    each = 6.0 * parameters + 12 * layers * width * scale.context
    batch = scale.batch_size * scale.context
    steps = max(round(budget / each / batch), 1)
    return Rung(layers, width, budget, parameters, steps, steps * batch, each * steps * batch, held_out)


def recipe(name: str, one: Rung, data: Path, overrides: Sequence[str]) -> Any:
    """The config of a run: the base recipe's, with rotary positions and normed queries and keys, for even training."""
    from gptjax.runs import config as configs

    scale = SCALES[name]
    keys = {
        "model.layers": one.layers, "model.width": one.width, "model.heads": heads(one.width),
        "model.context": scale.context, "model.positions": "rotary", "model.qk_norm": "head",
        "data.path": data, "data.batch_size": scale.batch_size, "train.dtype": scale.dtype, "train.steps": one.steps,
        "optimizer.learning_rate": scale.rate, "optimizer.beta2": scale.beta2,
        "schedule.warmup_steps": max(one.steps // 20, 1),
        "eval.every_steps": max(one.steps // 5, 1), "checkpoint.every_steps": max(one.steps // 4, 1),
        "checkpoint.keep": 1, "sample.max_tokens": 20, "sample.prompt": "The ",
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return configs.read(str(ROOT / "configs" / "base.py"), [*flags, *overrides])


def prepared(text: str, tokenizer: str, folder: Path) -> Path:
    """The set of the text, made once."""
    if not (folder / "index.json").exists():
        arguments = ["--input", text, "--tokenizer", tokenizer, "--held_out", "0.03", "--output", str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "gptjax.prepare", *arguments], stdout=sys.stderr, cwd=ROOT, check=False
        )
        if done.returncode:
            raise DataError(f"{text} could not be prepared; see above")
    return folder


def trained(one: Rung, config: Any, workdir: Path) -> dict[str, Any]:
    """The run's part of results.json; it is trained unless it is finished."""
    from gptjax.training import loop

    summary = loop.train(config, workdir)
    if summary["parameters"] != one.parameters:
        raise DataError(f"{workdir} has {summary['parameters']:,} parameters, not those that its budget counts")
    own = {key: summary[key] for key in ("seconds", "tokens_per_second")}
    return one._asdict() | {"loss": summary["val_loss"], "bits_per_byte": summary["val_bits_per_byte"]} | own


def columns(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and losses."""
    n, d, losses = (np.array([run[key] for run in runs], float) for key in ("parameters", "tokens", "loss"))
    return n, d, losses


def predicted(out: Path, runs: Sequence[dict[str, Any]], largest: Rung, times: int = BOOTSTRAPS) -> dict[str, Any]:
    """What the law of the runs says of the largest, as prediction.json has it, which is written here the first time."""
    path = out / "prediction.json"
    if not path.exists():
        n, d, losses = columns(runs)
        console.say(f"fitting    the law of {len(runs)} runs, and of {times} draws of them")
        law = fits.parametric(n, d, losses)
        several = fits.bootstrap(n, d, losses, law, times)
        at = largest.parameters, largest.tokens
        found = {
            "loss": float(law.loss(*at)),
            "interval": fits.interval(np.array([one.loss(*at) for one in several])),
            "law": law._asdict(),
            "intervals": {
                key: fits.interval(np.array([getattr(one, key) for one in several])) for key in fits.Law._fields
            },
            "runs": len(runs),
        }
        write_atomic(path, json.dumps(found, indent=2) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    return dict(found)


def isoflops(runs: Sequence[dict[str, Any]]) -> dict[float, fits.Parabola]:
    """The parabola of each budget that has three sizes."""
    by_budget: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        by_budget.setdefault(run["budget"], []).append(run)
    return {
        budget: fits.parabola(columns(own)[0], columns(own)[2]) for budget, own in by_budget.items() if len(own) > 2
    }


def plan(name: str, tokens: int | None = None) -> str:
    """The ladder with its cost; `tokens` of the text tell how often it is read."""
    rungs, rate = ladder(name), SCALES[name].flops_per_second
    lines = ["  ".join(["run".ljust(20), "parameters".rjust(12), "steps".rjust(7), "tokens".rjust(13), "minutes"])]
    for one in rungs:
        own = [one.name.ljust(20), f"{one.parameters:12,}", f"{one.steps:7,}", f"{one.tokens:13,}"]
        lines.append("  ".join([*own, f"{one.flops / rate / 60:7.1f}", "predicted first" if one.held_out else ""]))
    total = sum(one.flops for one in rungs)
    lines.append(
        f"{total:.2g} FLOPs in {len(rungs)} runs: {console.duration(total / rate)} at {rate / 1e9:,.0f} GFLOP/s,"
    )
    lines.append("and what starting, compiling and evaluating each take")
    if tokens:
        lines.append(f"the text is read at most {max(one.tokens for one in rungs) / tokens:.1f} times")
    return "\n".join(line.rstrip() for line in lines)


def measure(flags: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains what is not there yet; results.json grows run by run."""
    runtime.start()
    from gptjax.runs import config as configs

    console.say(plan(flags.scale))
    data = prepared(flags.data, SCALES[flags.scale].tokenizer, flags.runs / "set")
    runs, prediction = list[dict[str, Any]](), None
    for one in ladder(flags.scale):
        if one.held_out:
            prediction = predicted(flags.out, runs, one)
            console.say(f"predicted  {prediction['loss']:.4f} of {one.name}, before it is trained")
        config = configs.resolve(recipe(flags.scale, one, data, overrides))
        runs.append(trained(one, config, flags.runs / one.name))
        console.say(f"{one.name}: {runs[-1]['loss']:.4f}")
        found = {"scale": flags.scale, "overrides": [*overrides], "runs": runs, "prediction": prediction}
        write_atomic(flags.out / "results.json", json.dumps(found, indent=2) + "\n")
    return found


def said(found: dict[str, Any]) -> str:
    """The law, the exponents of both fits, and predicted beside measured."""
    small, prediction = [run for run in found["runs"] if not run["held_out"]], found["prediction"]
    best = {budget: one.best for budget, one in isoflops(small).items() if one.best}
    lines = [f"best size for {budget:.0e} FLOPs: {n:,.0f} parameters" for budget, n in best.items()]
    if len(best) > 1:
        exponent = fits.power(np.array([*best]), np.array([*best.values()]))[1]
        lines.append(f"IsoFLOP: best parameters grow as C^{exponent:.2f}")
    if not prediction:
        return "\n".join(lines)
    law = fits.Law(**prediction["law"])
    for key, value in prediction["law"].items():
        low, high = prediction["intervals"][key]
        lines.append(f"{key:<6} {value:10.4g}   95 % of bootstraps: {low:.4g} to {high:.4g}")
    lines.append(f"L(N, D): best parameters grow as C^{law.exponents()[0]:.2f}")
    low, high = prediction["interval"]
    lines.append(f"predicted {prediction['loss']:.4f} ({low:.4f} to {high:.4f})")
    for run in found["runs"]:
        if run["held_out"]:
            lines.append(f"measured  {run['loss']:.4f} ({run['loss'] - prediction['loss']:+.4f})")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """IsoFLOP parabolas, and losses of the law beside those measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    small = [run for run in found["runs"] if not run["held_out"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    parabolas = isoflops(small)
    for number, budget in enumerate(sorted({run["budget"] for run in small})):
        n, _, losses = columns([run for run in small if run["budget"] == budget])
        colour = f"C{number}"
        left.plot(n, losses, "o", color=colour, markersize=5, label=f"{budget:.0e} FLOPs")
        if budget in parabolas:
            own, x = parabolas[budget], np.geomspace(n.min(), n.max(), 100)
            left.plot(x, own.loss(x), color=colour, linewidth=1)
            if own.best and n.min() <= own.best <= n.max():
                left.plot(own.best, own.loss(own.best), "*", color=colour, markersize=12)
    left.set(xscale="log", xlabel="parameters", ylabel="held-out loss (nats per token)", title="runs of one budget")
    if found["prediction"]:
        law = fits.Law(**found["prediction"]["law"])
        n, d, losses = columns(small)
        right.plot(law.loss(n, d), losses, "o", color="tab:blue", label="runs that were fitted")
        for run in (run for run in found["runs"] if run["held_out"]):
            low, high = found["prediction"]["interval"]
            at = found["prediction"]["loss"]
            spread = [[max(at - low, 0)], [max(high - at, 0)]]
            right.errorbar([at], [run["loss"]], xerr=spread, fmt="D", color="tab:red", label="largest, predicted first")
        ends = [losses.min() * 0.95, losses.max() * 1.02]
        right.plot(ends, ends, color="gray", linewidth=1, linestyle=":")
        right.set(xlabel="loss by the law", ylabel="loss measured", title="$E + A / N^\\alpha + B / D^\\beta$")
        right.legend()
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read(out: Path) -> dict[str, Any]:
    """results.json.

    Raises:
      DataError: it is not there, or damaged.
    """
    try:
        return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{out / 'results.json'} cannot be read: {error}") from error


def main(argv: Sequence[str]) -> None:
    """Plans, trains or reads what is there, fits and draws it."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("--scale", choices=[*SCALES], default="cpu")
    novels = ROOT.parent / "shared/data/english_novels/*_*.txt"
    parser.add_argument("--data", default=str(novels), help="text: a file or a glob")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scaling_laws", help="where set and runs go")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and laws.png go")
    parser.add_argument("--plan", action="store_true", help="print the ladder and its cost, and train nothing")
    parser.add_argument("--redraw", action="store_true", help="the figure of the results that are there")
    flags, overrides = parser.parse_known_args(argv)
    if flags.plan:
        print(plan(flags.scale))
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    flags.runs.mkdir(parents=True, exist_ok=True)
    found = read(flags.out) if flags.redraw else measure(flags, overrides)
    plot(found, flags.out / "laws.png")
    print(json.dumps(found) if flags.json else said(found))


if __name__ == "__main__":
    arguments.run(main)
