"""Plots of a sweep: held-out loss against each swept key, and parallel coordinates of all keys."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gptjax.sweeps.results import DONE, PRUNED, Result
from gptjax.sweeps.space import Range, Space, is_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Scale(NamedTuple):
    """The axis scale of a key.

    Attributes:
      kind: "log", "linear", or "names" for a categorical axis.
      names: the values of a categorical axis, in order.
      is_range: True if values were drawn from a range, so that they rarely repeat.
    """

    kind: str
    names: list[Any]
    is_range: bool = False

    def position(self, value: Any) -> float:
        """Position of a value on the axis."""
        return float(self.names.index(value)) if self.kind == "names" else float(value)

    def fraction(self, value: Any, values: Sequence[Any]) -> float:
        """Position relative to the least and the greatest of some values, 0 to 1; 0.5 if they are equal."""
        transform = math.log if self.kind == "log" else float
        low, high, here = (transform(self.position(one)) for one in (*self._ends(values), value))
        return (here - low) / (high - low) if high > low else 0.5

    def _ends(self, values: Sequence[Any]) -> tuple[Any, Any]:
        return min(values, key=self.position), max(values, key=self.position)


def scale(key: str, space: Space, values: Sequence[Any]) -> Scale:
    """Chooses the scale of a key with these values."""
    if any(type(value) not in (int, float) for value in values):
        return Scale("names", sorted(set(values), key=values.index))
    axis = space.get(key)
    log = axis.kind == "log" if isinstance(axis, Range) else key != "seed" and is_log(values)
    return Scale("log" if log else "linear", [], isinstance(axis, Range))


def write(folder: Path, space: Space, results: Sequence[Result]) -> None:
    """Writes KEY.png for each swept key, and parallel.png if there are several keys."""
    folder.mkdir(exist_ok=True)
    by_key = scales(space, results)
    for key, key_scale in by_key.items():
        save(plot_key(key, key_scale, results), folder / f"{key}.png")
    if len(by_key) > 1 and any(one.status == DONE for one in results):
        save(parallel_coordinates(by_key, results), folder / "parallel.png")


def scales(space: Space, results: Sequence[Result]) -> dict[str, Scale]:
    """Chooses the scale of each swept key."""
    keys = list(dict.fromkeys(key for one in results for key in one.values))
    return {key: scale(key, space, [one.values[key] for one in results]) for key in keys}


def plot_key(key: str, on: Scale, results: Sequence[Result]) -> "Figure":
    """Plots held-out loss against a key: a point per trial, and a line through the median of each value."""
    figure, axes = new_figure(7)
    done = points(key, on, results, DONE)
    pruned = points(key, on, results, PRUNED)
    low, high = limits([loss for _, loss in (*done, *pruned)])
    axes.plot(*columns(medians(done, on.is_range)), color="tab:orange", marker=".", zorder=1, label="median")
    axes.plot(*columns(done), "o", color="tab:blue", markersize=5, alpha=0.7, label="trial")
    if pruned:
        clipped = [(x, min(loss, high)) for x, loss in pruned]
        axes.plot(*columns(clipped), "o", color="tab:blue", fillstyle="none", markersize=5, label="stopped early")
    if failed := [on.position(one.values[key]) for one in results if one.loss is None]:
        axes.plot(failed, [high] * len(failed), "x", color="tab:red", label="diverged or impossible", clip_on=False)
    axes.set(xlabel=key, ylabel="held-out loss (nats per token)", ylim=(low, high))
    if on.kind == "names":
        axes.set_xticks(range(len(on.names)), [label(name) for name in on.names])
        axes.set_xlim(-0.5, len(on.names) - 0.5)
    else:
        number_axis(axes, on, [one.values[key] for one in results])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def new_figure(width: float) -> "tuple[Figure, Axes]":
    """Creates an empty figure with this width in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained", dpi=100)
    return figure, figure.subplots()


def number_axis(axes: Any, on: Scale, values: Sequence[Any]) -> None:
    """Sets the scale of a numeric axis; a few values get one tick each."""
    from matplotlib import ticker

    axes.set_xscale(on.kind)
    few = sorted(set(values))
    if len(few) <= 7:
        axes.set_xticks(few, [f"{value:g}" for value in few])
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def points(key: str, on: Scale, results: Sequence[Result], status: str) -> list[tuple[float, float]]:
    """Positions and losses of the trials with a status."""
    return [
        (on.position(one.values[key]), one.loss) for one in results if one.status == status and one.loss is not None
    ]


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Unzips pairs into two lists, which may be empty."""
    return [x for x, _ in pairs], [y for _, y in pairs]


def medians(pairs: Sequence[tuple[float, float]], is_range: bool) -> list[tuple[float, float]]:
    """Median loss at each position; for a range, in about sqrt(n) bins with equal numbers of trials."""
    pairs = sorted(pairs)
    by_position: dict[float, list[float]] = {}
    for x, loss in pairs:
        by_position.setdefault(x, []).append(loss)
    if not is_range or not pairs:
        return [(x, statistics.median(losses)) for x, losses in by_position.items()]
    parts = np.array_split(np.array(pairs), round(math.sqrt(len(pairs))))
    return [(float(np.median(part[:, 0])), float(np.median(part[:, 1]))) for part in parts]


def limits(losses: Sequence[float]) -> tuple[float, float]:
    """Limits of a loss axis, without outliers far above the median."""
    if not losses:
        return 0.0, 1.0
    low, middle = min(losses), statistics.median(losses)
    high = min(max(losses), middle + 5 * max(middle - low, 0.02))
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def parallel_coordinates(scales: Mapping[str, Scale], results: Sequence[Result]) -> "Figure":
    """Plots parallel coordinates: a line per finished trial through its values and its loss; darker is lower."""
    from matplotlib import colormaps

    done = [one for one in results if one.status == DONE and one.loss is not None]
    losses = [one.loss or 0.0 for one in done]
    low, high = min(losses), min(max(losses), limits(losses)[1])
    figure, axes = new_figure(2.2 + 2.2 * len(scales))
    all_of = {key: [one.values[key] for one in done] for key in scales}
    for one in sorted(done, key=lambda one: -(one.loss or 0.0)):
        share = min(((one.loss or 0.0) - low) / (high - low), 1.0) if high > low else 0.0
        heights = [on.fraction(one.values[key], all_of[key]) for key, on in scales.items()]
        axes.plot([*heights, share], color=colormaps["viridis"](0.9 * share), alpha=0.8, linewidth=2.5 - 1.5 * share)
    for place, (key, on) in enumerate(scales.items()):
        ticks(axes, place, {label(value): on.fraction(value, all_of[key]) for value in tick_values(all_of[key], on)})
    of_loss = {f"{low + part * (high - low):.3f}": part for part in (0.0, 0.25, 0.5, 0.75, 1.0)}
    ticks(axes, len(scales), of_loss)
    axes.set_xticks(range(len(scales) + 1), [*(key.rsplit(".", 1)[-1] for key in scales), "held-out loss"])
    axes.set(ylim=(-0.05, 1.05), yticks=[], xlim=(-0.2, len(scales) + 0.5))
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{len(done)} finished trials; the darker the line, the lower the loss", fontsize=11)
    return figure


def ticks(axes: Any, place: float, shares: Mapping[str, float]) -> None:
    """Draws a vertical axis with its labels."""
    axes.axvline(place, color="black", linewidth=1)
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for text, share in shares.items():
        axes.plot([place, place + 0.03], [share, share], color="black", linewidth=1)
        axes.text(place + 0.05, share, text, fontsize=8, va="center", bbox=white, zorder=5)


def tick_values(values: Sequence[Any], on: Scale) -> list[Any]:
    """Selects the values to label on an axis: all if there are few, otherwise five at even ranks."""
    distinct = sorted(set(values), key=on.position)
    if len(distinct) <= 8:
        return distinct
    return [distinct[round(part * (len(distinct) - 1))] for part in (0, 0.25, 0.5, 0.75, 1)]


def label(value: Any) -> str:
    """Formats a value for a tick label."""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"...{text[-21:]}"


def save(figure: Any, path: Path) -> None:
    """Writes a figure completely or not at all."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # workers on one study may write at the same time
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
