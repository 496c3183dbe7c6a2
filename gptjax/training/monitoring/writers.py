"""Where metrics go: metrics.jsonl always; TensorBoard and Weights & Biases where a run asks for them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gptjax.config.errors import ConfigError
from gptjax.core import console, schema
from gptjax.core.files import disk_error, read_text, write_atomic

Line = dict[str, Any]  # "step" and the metrics of it; None stands for what is not known
LINE = {"step": int, str: (float, None)}


class Writer(Protocol):
    """Takes the metrics of one step after the other."""

    def write(self, line: Line) -> None:
        """Adds one step's metrics."""

    def close(self) -> None:
        """Flushes; nothing is written afterwards."""


class JsonLines:
    """`metrics.jsonl`: one object a line, `step` first. Lines that find no room on the disk wait for it."""

    def __init__(self, workdir: Path, config: dict[str, Any], start: int) -> None:
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= start]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.waiting: list[str] = []

    def write(self, line: Line) -> None:
        """Adds one line."""
        self.waiting.append(json.dumps(line) + "\n")
        try:
            self.close()
        except OSError as error:
            if not disk_error(error):
                raise
            if len(self.waiting) == 1:
                console.say(f"{self.path} cannot be written: {disk_error(error)}; its lines wait until it can")

    def close(self) -> None:
        """Writes the lines that wait, all or none."""
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
    """The objects of a run's metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
      DataError: it is damaged.
    """
    return schema.read_lines(workdir / "metrics.jsonl", LINE)


def _known(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if value is not None and name != "step"}


class TensorBoard:
    """Event files in `workdir/tensorboard`."""

    def __init__(self, workdir: Path, config: dict[str, Any], start: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError("log.writers: tensorboard needs pip install 'gptjax[tensorboard]'") from error
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, line: Line) -> None:
        """Adds one scalar for each metric."""
        for name, value in _known(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flushes the events."""
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb, named after the workdir; WANDB_MODE=offline keeps it on disk, in `workdir/wandb`."""

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
        self.run.log(_known(line), step=line["step"])

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def _run_id(workdir: Path) -> str:
    # Kept in the run directory, so that a run that goes on is the same run there.
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
    """The named writers, and always JsonLines, to go on after step `start`; later metrics of a crash are dropped.

    Raises:
      ConfigError: one needs a package that is not installed.
    """
    others = [WRITERS[name](workdir, config, start) for name in dict.fromkeys(names) if name != "jsonl"]
    return [*others, JsonLines(workdir, config, start)]
