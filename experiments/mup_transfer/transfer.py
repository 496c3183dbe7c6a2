"""Which learning rate is best, by width, in both parametrisations: one picture.

python experiments/mup_transfer/transfer.py --data=input.txt        # tinyshakespeare; about half an hour on two cores
python experiments/mup_transfer/transfer.py --redraw                # table and picture from results.json alone

All rates of a width are one compiled program (gptjax.training.population.population). What is finished is not trained
again. Other keys go as to gptjax.train, for all runs.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, console, runtime
from gptjax.runs import config as configs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPE = str(ROOT / "configs" / "shakespeare.py")
BASE_WIDTH, HEAD_WIDTH = 64, 16
PARAMETRIZATIONS = ("standard", "mup")


def config_of(parametrization: str, width: int, rate: float, overrides: Sequence[str]) -> Any:
    """The run of a width at a rate; heads are added, their width stays."""
    flags = {
        "model.width": width,
        "model.heads": width // HEAD_WIDTH,
        "model.parametrization": parametrization,
        "optimizer.learning_rate": rate,
        "schedule.warmup_steps": 40,
        "train.steps": 400,
        "eval.every_steps": 400,
        "checkpoint.every_steps": 400,
        "sample.max_tokens": 1,
    }
    if parametrization == "mup":
        flags |= {"model.base_width": BASE_WIDTH, "model.base_head_width": HEAD_WIDTH}
    return configs.read(RECIPE, [*(f"--config.{key}={value}" for key, value in flags.items()), *overrides])


def trained(
    parametrization: str, width: int, rates: Sequence[float], runs: Path, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each rate; a loss of None is a run that diverged."""
    from gptjax.training import loop

    made = [config_of(parametrization, width, rate, overrides) for rate in rates]
    where = [runs / f"{parametrization}-{width}" / f"{rate:.6g}" for rate in rates]
    summaries = loop.train_population(made, where)
    return [
        {"parametrization": parametrization, "width": width, "rate": rate, "loss": own["val_loss"] if own else None}
        for rate, own in zip(rates, summaries, strict=True)
    ]


def curves(rows: Sequence[dict[str, Any]], parametrization: str) -> dict[int, list[tuple[float, float]]]:
    """(rate, loss) of the runs that did not diverge, by width."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: (row["width"], row["rate"])):
        if row["parametrization"] == parametrization and row["loss"] is not None:
            found.setdefault(row["width"], []).append((row["rate"], row["loss"]))
    return found


def best_rate(curve: Sequence[tuple[float, float]]) -> float:
    """Where a parabola through the least loss and its neighbours, over the rate's logarithm, is least."""
    least = min(range(len(curve)), key=lambda i: curve[i][1])
    if least in (0, len(curve) - 1):
        return curve[least][0]
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(rate), loss) for rate, loss in curve[least - 1 : least + 2])
    above = (x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)
    below = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    return math.exp(x1 - above / (2 * below))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The best rate and its loss, by width and parametrisation, as Markdown."""
    lines = ["| parametrisation | width | best rate | least loss |", "|---|---|---|---|"]
    for name in PARAMETRIZATIONS:
        for width, curve in curves(rows, name).items():
            lines.append(f"| {name} | {width} | {best_rate(curve):.2g} | {min(loss for _, loss in curve):.3f} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over the rate, a line a width, a panel a parametrisation; a dot where each line is least."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    every = [row["loss"] for row in rows if row["loss"] is not None]
    for axes, name in zip(panels, PARAMETRIZATIONS, strict=True):
        for i, (width, curve) in enumerate(curves(rows, name).items()):
            color = plt.cm.viridis(i / 4)
            axes.plot(*zip(*curve, strict=True), color=color, marker=".", label=f"width {width}")
            axes.plot(best_rate(curve), min(loss for _, loss in curve), "o", color=color, markersize=8)
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="learning rate at the peak", ylim=(min(every) - 0.05, min(every) + 1.0))
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("held-out loss (nats per token)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, prints and draws."""
    parser = arguments.Parser(prog="python experiments/mup_transfer/transfer.py", description=__doc__)
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/tinyshakespeare/input.txt"), help="a text")
    parser.add_argument("--widths", default="32,64,128,256", help=f"multiples of {HEAD_WIDTH}")
    parser.add_argument("--rates", default="-11,-4", help="least and most, as powers of 2")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "mup_transfer")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and transfer.png go")
    parser.add_argument("--redraw", action="store_true", help="train nothing")
    flags, overrides = parser.parse_known_args(argv)
    try:
        widths = [int(width) for width in flags.widths.split(",")]
        low, high = (int(power) for power in flags.rates.split(","))
    except ValueError:
        raise ConfigError("--widths is like 32,64,128 and --rates like -11,-4") from None
    file = flags.out / "results.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    rates = [2.0**power for power in range(low, high + 1)]
    if not flags.redraw:
        runtime.start()
        runtime.processors_as_devices()  # members lie side by side on them
    for name in () if flags.redraw else PARAMETRIZATIONS:
        for width in widths:
            known = {(row["parametrization"], row["width"], row["rate"]) for row in rows}
            wanted = [rate for rate in rates if (name, width, rate) not in known]
            if wanted:
                console.say(f"{name}, width {width}")
                text = [f"--config.data.path={flags.data}", *overrides]
                rows += trained(name, width, wanted, flags.runs, text)
                flags.out.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not rows:
        raise ConfigError(f"{file} has no results; leave --redraw out")
    print(table(rows))
    plot(rows, flags.out / "transfer.png")


if __name__ == "__main__":
    arguments.run(main)
