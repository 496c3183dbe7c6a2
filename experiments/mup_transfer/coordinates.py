"""How far activations move in the first steps, by width, in both parametrisations: table and picture.

python experiments/mup_transfer/coordinates.py                                     # a minute or two on two cores
python experiments/mup_transfer/coordinates.py --config.optimizer.name=muon --out=DIR
"""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.core import arguments, console, runtime
from gptjax.runs import config as configs

HERE = Path(__file__).resolve().parent
RECIPE = str(HERE.parents[1] / "configs" / "base.py")
STEPS = 4
COMMON = [
    "--config.model.layers=2",
    "--config.model.head_width=16",
    "--config.model.context=32",
    "--config.optimizer.learning_rate=3e-3",
    "--config.optimizer.weight_decay=0.0",
    "--config.schedule.name=constant",
    "--config.schedule.warmup_steps=0",
]
PARAMETRIZATIONS = {
    "standard": [],
    "mup": [
        "--config.model.parametrization=mup",
        "--config.model.base_width=64",
        "--config.model.base_head_width=16",
    ],
}


def plot(widths: list[int], moved: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """A panel for each parametrisation: movement after the last step over the width, a line for each place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from gptjax.interpret.coordinates import slopes

    figure, panels = plt.subplots(1, len(moved), figsize=(10, 4.5), sharey=True, layout="constrained")
    for axes, (name, found) in zip(panels, moved.items(), strict=True):
        for place, slope in slopes(widths, found).items():
            axes.loglog(widths, found[place][:, -1], marker="o", label=f"{place}: slope {slope:+.2f}")
        axes.set(title=name, xlabel="width", xticks=widths, xticklabels=widths)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel(f"root mean square change after {STEPS} steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Any) -> None:
    """Measures, prints and draws."""
    parser = arguments.Parser(prog="python experiments/mup_transfer/coordinates.py", description=__doc__)
    parser.add_argument("--widths", default="64,128,256,512", help="multiples of model.head_width")
    parser.add_argument("--out", type=Path, default=HERE, help="where coordinates.png goes")
    flags, overrides = parser.parse_known_args(argv)
    try:
        widths = [int(width) for width in flags.widths.split(",")]
    except ValueError:
        raise configs.ConfigError(f"--widths={flags.widths} is no list of numbers, such as 64,128,256") from None
    runtime.start()
    from gptjax.interpret import coordinates

    moved = {}
    with console.bar("measuring", len(PARAMETRIZATIONS)) as advance:
        for name, own in PARAMETRIZATIONS.items():
            moved[name] = coordinates.over_widths(configs.read(RECIPE, [*COMMON, *own, *overrides]), widths, STEPS)
            advance()
    found = {name: coordinates.slopes(widths, own) for name, own in moved.items()}
    print("| slope of log(change) over log(width) | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for place in found["mup"]:
        print(f"| {place} | " + " | ".join(f"{own[place]:+.2f}" for own in found.values()) + " |")
    flags.out.mkdir(parents=True, exist_ok=True)
    plot(widths, moved, flags.out / "coordinates.png")


if __name__ == "__main__":
    arguments.run(main)
