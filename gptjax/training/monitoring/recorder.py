"""Lines of metrics, one step behind the devices, for the writers, the progress bar and a callback."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.core import console
from gptjax.data.batches import stage_of
from gptjax.optim import schedule, skip_step
from gptjax.runs.train_state import TrainState
from gptjax.sharding import processes
from gptjax.training.monitoring import goodput, metrics, run_stats, writers
from gptjax.training.monitoring.writers import Line
from gptjax.training.recovery import GOOD, LEFT_OUT, BadStepTracker
from gptjax.training.setup import TrainSetup

OnLine = Callable[[Line], None]


class Recorder:
    """Holds the metrics of one step until `take`, which makes a line of them if one is due.

    A context manager: leaving it closes the writers.
    """

    def __init__(self, setup: TrainSetup, state: TrainState, advance: Callable[..., None], on_line: OnLine) -> None:
        c = self.config = setup.config
        self.setup, self.advance, self.on_line = setup, advance, on_line
        first = processes.is_first()
        self.writers = writers.open_writers(c.log.writers, setup.workdir, c.to_dict(), int(state.step)) if first else []
        shapes = state.eval_shapes()
        self.flops_per_token = {
            stage.context: metrics.flops_per_token(shapes, c.model, stage.context) for stage in setup.stages
        }
        # Computed at once before the first step: one by one they would wait for the steps on the device.
        self.learning_rates = np.asarray(jax.vmap(schedule(c))(jnp.arange(c.train.steps)))
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.smooth_loss = math.nan
        self.bad_steps = BadStepTracker(c.guard.patience)
        self.reset_rates()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.close()

    def reset_rates(self) -> None:
        """Resets the counters of the rates for the next line."""
        self.tokens, self.flops, self.steps, self.since = 0, 0.0, 0, self.setup.clock.reading()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the pushed step; the block does not count as training time."""
        self.write(self.take())
        with self.setup.clock.during("profile"):
            yield

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        """Stores the metrics of a step, which the devices may still be computing."""
        self.pending = step, values

    def take(self, due: bool = False) -> Line:
        """Waits for the pushed step; returns its line, or an empty one if none is due.

        Args:
          due: makes a line even if `log.every_steps` asks for none.

        Raises:
          RepeatedBadSteps: too many steps in a row were bad.
        """
        if self.pending is None:
            return {}
        (step, pending), self.pending = self.pending, None
        values = jax.device_get(pending)
        loss, verdict = float(values["loss"]), self.bad_steps.read(step, values)
        stage = stage_of(step, self.setup.stages)
        tokens = 0 if verdict == LEFT_OUT else stage.batch_size * stage.context
        self.tokens += tokens
        self.steps += 1
        self.flops += tokens * self.flops_per_token[stage.context]
        if math.isnan(self.smooth_loss) and verdict == GOOD:
            console.say(f"first step {self.setup.clock.session():.1f} s after the start")
            self.smooth_loss = loss
        self.smooth_loss += 0.05 * (loss - self.smooth_loss) if verdict == GOOD else 0.0
        self.advance(1, step=f"{step:,}/{self.config.train.steps:,}", loss=f"{self.smooth_loss:.3f}")
        if not due and step % self.config.log.every_steps:
            return {}
        now = self.setup.clock.reading()
        waited, worked = (now[kind] - self.since[kind] for kind in ("data", "step"))
        rate, flops = self.tokens / max(waited + worked, 1e-9), self.flops / max(self.tokens, 1)
        wait_ms = 1e3 * waited / self.steps
        self.reset_rates()
        mfu = metrics.mfu(rate, flops, jax.devices()[0].device_kind, self.setup.mesh.size)
        self.advance(0, **{"tokens/s": f"{rate:,.0f}"}, **({} if mfu is None else {"mfu": f"{mfu:.1%}"}))
        objective_metrics = {
            f"train/{name}": float(value) for name, value in values.items() if _is_objective_metric(name)
        }
        updates = step - self.bad_steps.skipped - (verdict == GOOD)  # number of updates before this step
        return {
            "step": step,
            "train/loss": loss,
            **objective_metrics,
            **run_stats.select(values, step, self.config.log.statistics),
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(self.learning_rates[updates]),
            "skipped_steps": self.bad_steps.skipped,
            "tokens_per_second": rate or None,
            "mfu": mfu,
            "data/wait_ms": wait_ms,
        }

    def write(self, line: Line) -> None:
        """Passes a line that is not empty to the writers, with the time by kind until now."""
        if not line:
            return
        line = {name: None if _is_not_json(value) else value for name, value in line.items()}
        line |= goodput.as_metrics(self.setup.clock.reading())
        for writer in self.writers:
            writer.write(line)
        self.on_line(line)


def _is_objective_metric(name: str) -> bool:
    """Returns True for a metric of the objective other than the loss."""
    return name not in ("loss", "grad_norm", *skip_step.METRICS) and not name.startswith(run_stats.PREFIX)


def _is_not_json(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
