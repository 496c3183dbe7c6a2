"""Writers of metrics: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gptjax.config.errors import ConfigError
from gptjax.core import console, schema
from gptjax.core.files import disk_error, read_text, write_atomic

Line = dict[str, Any]  # "step" and its metrics; None: unknown
LINE = {"step": int, str: (float, None)}


class Writer(Protocol):
    """Writes the metrics of one step after another."""

    def write(self, line: Line) -> None:
        """Writes the metrics of one step."""

    def close(self) -> None:
        """Flushes and closes."""


class JsonLines:
    """Writes metrics.jsonl: one object per line, `step` first. Lines that a full disk refuses are written later."""

    def __init__(self, workdir: Path, config: dict[str, Any], start: int) -> None:
        self.path = workdir / "metrics.jsonl"
        earlier = [line for line in read_metrics(workdir) if line["step"] <= start]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in earlier))
        self.waiting: list[str] = []

    def write(self, line: Line) -> None:
        """Writes one line."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self.close()
        except OSError as error:
            if not disk_error(error):
                raise
            if len(self.waiting) == 1:
                console.say(f"{self.path} cannot be written: {disk_error(error)}; its lines are kept until it can")

    def close(self) -> None:
        """Writes the waiting lines, all or none."""
        if not self.waiting:
            return
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
        except OSError:
            os.truncate(self.path, size)
            raise
        self.waiting.clear()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the objects of a run's metrics.jsonl, without a last line that a crash cut short.

    Raises:
      DataError: the file is damaged.
    """
    return schema.read_lines(workdir / "metrics.jsonl", LINE)


def _without_none(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if value is not None and name != "step"}


class TensorBoard:
    """Writes event files to `workdir/tensorboard`."""

    def __init__(self, workdir: Path, config: dict[str, Any], start: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.writers: tensorboard needs pip install 'gptjax[tensorboard]'") from error
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, line: Line) -> None:
        """Writes one scalar per metric."""
        for name, value in _without_none(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flushes the events."""
        self.writer.close()


class WeightsAndBiases:
    """Logs to a wandb run named after the workdir; with WANDB_MODE=offline it stays in `workdir/wandb`."""

    def __init__(self, workdir: Path, config: dict[str, Any], start: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("log.writers: wandb needs pip install 'gptjax[wandb]'") from error
        self.run = wandb.init(
            dir=str(workdir), project="gptjax", name=workdir.name, id=_run_id(workdir), resume="allow", config=config
        )

    def write(self, line: Line) -> None:
        """Logs the metrics at that step."""
        self.run.log(_without_none(line), step=line["step"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def _run_id(workdir: Path) -> str:
    # Saved in the run directory, so that a resumed run continues the same wandb run.
    path = workdir / "wandb_id"
    if not path.exists():
        import uuid

        write_atomic(path, uuid.uuid4().hex[:12])
    return read_text(path)


WRITERS: dict[str, Callable[[Path, dict[str, Any], int], Writer]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_writers(names: tuple[str, ...], workdir: Path, config: dict[str, Any], start: int) -> list[Writer]:
    """Opens the named writers, and always JsonLines, to continue after step `start`; later lines are dropped.

    Raises:
      ConfigError: a writer needs a package that is not installed.
    """
    others = [WRITERS[name](workdir, config, start) for name in dict.fromkeys(names) if name != "jsonl"]
    return [*others, JsonLines(workdir, config, start)]
