"""Report of a finished run: summary.json, loss.png and samples.txt."""

import json
import statistics
from pathlib import Path
from typing import Any

from gptjax.config.errors import CheckpointError, DataError
from gptjax.core import schema
from gptjax.core.files import write_atomic
from gptjax.evals.held_out import COUNT_METRICS
from gptjax.runs.writers import read_metrics
from gptjax.training.monitoring import goodput
from gptjax.training.monitoring.goodput import Clock

SUMMARY = "summary.json"
SHAPE = {"steps": int, "parameters": int, "tokens_per_second": float, "val_loss": float, "seconds": float, str: float}


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Reads the summary of a finished run; returns None if it is not finished."""
    path = workdir / SUMMARY
    if not path.exists():
        return None
    try:
        return schema.read(path, SHAPE, finite=False)
    except DataError as error:
        raise CheckpointError(f"{error}; delete it to create it again") from error


def summarize(workdir: Path, steps: int, parameters: int, quality: dict[str, float]) -> dict[str, Any]:
    """Collects the final metrics by name, except the time; tokens per second is the median over metrics.jsonl.

    Args:
      workdir: the run's directory.
      steps: number of steps trained.
      parameters: number of parameters.
      quality: of all held-out text, see gptjax.evals.held_out, with the sizes of general-purpose compressors.
    """
    lines = read_metrics(workdir)
    compressed = {name: value for name, value in quality.items() if name.startswith(("gzip_", "xz_"))}
    validation = {name: value for name, value in quality.items() if name not in (*COUNT_METRICS, *compressed)}
    return {
        "steps": steps,
        "tokens_per_second": statistics.median([line.get("tokens_per_second") or 0.0 for line in lines]),
        **{f"val_{name}": value for name, value in validation.items()},
        **compressed,
        "parameters": parameters,
    }


def write(workdir: Path, summary: dict[str, Any], sample: str, clock: Clock) -> dict[str, Any]:
    """Writes samples.txt, loss.png and, last, summary.json, which marks the run as finished; returns the summary."""
    write_atomic(workdir / "samples.txt", sample + "\n")
    plot(workdir, summary)
    reading = clock.reading()
    summary = summary | goodput.as_metrics(reading) | {"goodput": goodput.goodput(reading)}
    write_atomic(workdir / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def plot(workdir: Path, summary: dict[str, Any]) -> None:
    """Plots training and held-out loss by step to loss.png; bits per byte and compressors on the right-hand axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in read_metrics(workdir) if line.get("train/loss") is not None]
    steps, losses = [line["step"] for line in lines], [line["train/loss"] for line in lines]
    evaluations = [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.6, label="training")
    axes.plot(*zip(*evaluations, strict=True), color="tab:orange", marker="o", markersize=3, label="held-out sample")
    top, low = min(max(losses), statistics.median(losses) * 2), min([*losses, summary["val_loss"]])
    if "gzip_bits_per_byte" in summary:
        low = min(low, _plot_compressors(axes, summary, top))
    else:
        axes.set_title(f"held-out loss: {summary['val_loss']:.3f}", fontsize=11)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(low * 0.95, top * 1.02 or None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = workdir / ".loss.png"
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    temporary.replace(workdir / "loss.png")


def _plot_compressors(axes: Any, summary: dict[str, Any], top: float) -> float:
    """Draws lines for the compressors and an axis of bits per byte; returns the loss that corresponds to xz."""
    per_bit = summary["val_loss"] / summary["val_bits_per_byte"]  # nats per token for one bit per byte
    for name, style in (("gzip", ":"), ("xz", "--")):
        at = summary[f"{name}_bits_per_byte"]
        if at * per_bit < top:
            axes.axhline(at * per_bit, color="gray", linestyle=style, linewidth=1, label=f"{name} -9: {at:.2f}")
    axes.set_title(f"held-out text: {summary['val_bits_per_byte']:.3f} bits per byte", fontsize=11)
    right = axes.secondary_yaxis("right", functions=(lambda x: x / per_bit, lambda x: x * per_bit))
    right.set_ylabel("held-out bits per byte")
    return float(summary["xz_bits_per_byte"] * per_bit)
