"""The devices' numbers, one step behind, as lines of metrics: to the writers, the progress bar and a listener."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gptjax.command import Diverged
from gptjax.optim import schedule
from gptjax.training import metrics, writers

Line = dict[str, float | None]
OnLine = Callable[[Line], None]


class Recorder:
    """Holds one step's numbers until `flush`, and writes a line for each step that is due.

    A step is due when it is logged, evaluated, saved or the last. A context: leaving it closes the writers.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        params: Any,
        start: int,
        seconds: Callable[[], float],
        advance: Callable[..., None],
        on_line: OnLine,
    ) -> None:
        c = self.config = config
        self.advance, self.on_line = advance, on_line
        self.writers = writers.open_writers(c.log.writers, workdir, c.to_dict(), start)
        self.seconds = seconds
        self.tokens_per_step = c.data.batch_size * c.data.context
        self.flops = metrics.flops_per_token(params, c.model.layers, c.model.width, c.data.context)
        self.learning_rate = schedule(c)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.smooth_loss = math.nan
        self.steps_timed = 0
        self.restart_clock()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.close()

    def restart_clock(self) -> None:
        """What has passed since the newest line does not count as training."""
        self.since = time.monotonic()

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's loss and gradient norm, which the devices may still be computing."""
        self.pending = step, values

    def flush(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Waits for the step that was pushed and writes its line if it is due.

        Args:
          evaluate: gives held-out loss for that line; the step is due then, and its time does not count.

        Raises:
          Diverged: the loss is not finite.
        """
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        loss = float(values["loss"])
        if not math.isfinite(loss):
            raise Diverged(f"training diverged: the loss at step {step} is {loss}; try a lower learning rate")
        self.steps_timed += 1
        self.smooth_loss = loss if math.isnan(self.smooth_loss) else 0.95 * self.smooth_loss + 0.05 * loss
        self.advance(1, step=f"{step:,}/{self.config.train.steps:,}", loss=f"{self.smooth_loss:.3f}")
        if evaluate is not None or step % self.config.log.every_steps == 0:
            self._write(step, loss, float(values["grad_norm"]), evaluate)

    def _write(self, step: int, loss: float, grad_norm: float, evaluate: Callable[[], dict[str, float]] | None) -> None:
        rate = self.steps_timed * self.tokens_per_step / max(time.monotonic() - self.since, 1e-9)
        self.steps_timed = 0
        device = jax.devices()[0].device_kind
        line: Line = {"train/loss": loss}
        held_out = evaluate() if evaluate else {}
        if held_out:
            line |= {"val/loss": held_out["loss"], "val/bits_per_byte": held_out["bits_per_byte"]}
        line |= {
            "tokens_per_second": rate,
            "mfu": metrics.mfu(rate, self.flops, device, jax.device_count()),
            "learning_rate": float(self.learning_rate(step - 1)),
            "grad_norm": grad_norm,
            "seconds": self.seconds(),
        }
        for writer in self.writers:
            writer.write(step, line)
        self.on_line({"step": step, **line})
        self.advance(0, **{"tokens/s": f"{rate:,.0f}"})
        self.restart_clock()
