"""Lines of metrics of all members of a population, one step behind the devices, for the writers and the progress bar.

A run is a population of one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gptjax.core import console
from gptjax.data.batches import stage_of
from gptjax.optim import schedule, skip_step
from gptjax.runs import writers
from gptjax.runs.train_state import TrainState
from gptjax.runs.writers import Line
from gptjax.sharding import processes
from gptjax.training.monitoring import goodput, metrics, run_stats
from gptjax.training.recovery import GOOD, LEFT_OUT, BadStepTracker, RepeatedBadSteps
from gptjax.training.setup import TrainSetup

OnLine = Callable[[int, Line], None]  # called with the number of a member and a line of its metrics
OnBadSteps = Callable[[int, RepeatedBadSteps], None]


class MemberRecorder:
    """Makes the lines of one member, and passes them to its writers.

    Args:
      setup: of the member.
      shapes: of its state.
      step: that it starts or resumes at.
    """

    def __init__(self, setup: TrainSetup, shapes: TrainState, step: int) -> None:
        c, stages = setup.config, setup.batches.stages
        self.setup = setup
        self.writers = (
            writers.open_writers(c.log.writers, setup.workdir, c.to_dict(), step) if processes.is_first() else []
        )
        self.flops_per_token = {
            stage.context: metrics.flops_per_token(shapes.eval_shapes(), c.model, stage.context) for stage in stages
        }
        self.set_schedule(c)
        self.smooth_loss = math.nan
        self.bad_steps = BadStepTracker(c.guard.patience)
        self.reset_rates()

    def set_schedule(self, config: ConfigDict) -> None:
        """Takes the learning rates of a config from now on."""
        # Computed at once before the first step: one by one they would wait for the steps on the device.
        self.learning_rates = np.asarray(jax.vmap(schedule(config))(jnp.arange(config.train.steps)))

    def reset_rates(self) -> None:
        """Resets the counters of the rates for the next line."""
        self.tokens, self.flops, self.steps, self.since = 0, 0.0, 0, self.setup.clock.reading()

    def read(self, step: int, values: Mapping[str, Any]) -> str:
        """Counts a step with these metrics; returns its verdict, see gptjax.training.recovery.

        Raises:
          RepeatedBadSteps: too many steps in a row were bad.
        """
        verdict = self.bad_steps.read(step, values)
        stage = stage_of(step, self.setup.batches.stages)
        tokens = 0 if verdict == LEFT_OUT else stage.batch_size * stage.context
        self.tokens += tokens
        self.flops += tokens * self.flops_per_token[stage.context]
        self.steps += 1
        if verdict == GOOD:
            loss = float(values["loss"])
            self.smooth_loss = loss if math.isnan(self.smooth_loss) else self.smooth_loss
            self.smooth_loss += 0.05 * (loss - self.smooth_loss)
        return verdict

    def line(self, step: int, values: Mapping[str, Any], verdict: str) -> Line:
        """Makes the line of a step that was read, with the rates since the previous line."""
        now, statistics_every = self.setup.clock.reading(), self.setup.config.log.statistics
        waited, worked = (now[kind] - self.since[kind] for kind in ("data", "step"))
        rate, flops = self.tokens / max(waited + worked, 1e-9), self.flops / max(self.tokens, 1)
        wait_ms = 1e3 * waited / self.steps
        self.reset_rates()
        updates = step - self.bad_steps.skipped - (verdict == GOOD)  # number of updates before this step
        return {
            "step": step,
            "train/loss": float(values["loss"]),
            **{f"train/{name}": float(value) for name, value in values.items() if _is_objective_metric(name)},
            **run_stats.select(values, step, statistics_every),
            "grad_norm": float(values["grad_norm"]),
            "learning_rate": float(self.learning_rates[updates]),
            "skipped_steps": self.bad_steps.skipped,
            "tokens_per_second": rate or None,
            "mfu": metrics.mfu(rate, flops, jax.devices()[0].device_kind, self.setup.parts.mesh.size),
            "data/wait_ms": wait_ms,
        }

    def write(self, line: Line) -> Line:
        """Passes a line to the writers, with the time by kind until now; returns what was written."""
        line = {name: None if _is_not_json(value) else value for name, value in line.items()}
        line |= goodput.as_metrics(self.setup.clock.reading())
        for writer in self.writers:
            writer.write(line)
        return line


class Recorder:
    """Holds the metrics of one step until `take`, which makes a line of them for each member if one is due.

    A context manager: leaving it closes the writers.

    Args:
      setups: of all members.
      shapes: of the state of one member.
      step: that they start or resume at.
      advance: moves the progress bar.
      on_line: called with each line as it is written.
      on_bad_steps: called with a member whose steps were bad too often in a row; unless it raises, the member has
        diverged and gets no more lines.
    """

    def __init__(
        self,
        setups: Sequence[TrainSetup],
        shapes: TrainState,
        step: int,
        advance: Callable[..., None],
        on_line: OnLine,
        on_bad_steps: OnBadSteps,
    ) -> None:
        self.members = [MemberRecorder(setup, shapes, step) for setup in setups]
        self.advance, self.on_line, self.on_bad_steps = advance, on_line, on_bad_steps
        self.alive = [True] * len(setups)
        self.started = False
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            for writer in member.writers:
                writer.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the pushed step; the block does not count as training time."""
        self.write(self.take())
        with self.members[0].setup.clock.during("profile"):
            yield

    def push(self, step: int, values: dict[str, jax.Array]) -> None:
        """Stores the metrics of a step, which the devices may still be computing; of several members [N] each."""
        self.pending = step, values

    def take(self, due: bool = False) -> list[Line]:
        """Waits for the pushed step; returns one line per member, empty where none is due.

        Args:
          due: makes a line even if `log.every_steps` asks for none.
        """
        if self.pending is None:
            return [{} for _ in self.members]
        (step, pending), self.pending = self.pending, None
        values, config = jax.device_get(pending), self.members[0].setup.config
        due = due or step % config.log.every_steps == 0
        lines = [self._take_member(m, step, values, due) for m in range(len(self.members))]
        self._show(step, config.train.steps, lines)
        return lines

    def _take_member(self, m: int, step: int, values: Mapping[str, Any], due: bool) -> Line:
        if not self.alive[m]:
            return {}
        member = self.members[m]
        if len(self.members) > 1:
            values = {name: value_N[m] for name, value_N in values.items()}
        try:
            with console.quiet() if m else nullcontext():  # the first member reports for all
                verdict = member.read(step, values)
        except RepeatedBadSteps as bad:
            self.on_bad_steps(m, bad)
            self.alive[m] = False
            return {}
        return member.line(step, values, verdict) if due else {}

    def _show(self, step: int, steps: int, lines: Sequence[Line]) -> None:
        """Moves the progress bar by a step."""
        losses = [member.smooth_loss if self.alive[m] else math.nan for m, member in enumerate(self.members)]
        if not self.started and not all(map(math.isnan, losses)):
            self.started = True
            console.say(f"first step {self.members[0].setup.clock.session():.1f} s after the start")
        facts = {"step": f"{step:,}/{steps:,}"}
        if len(self.members) == 1:
            facts["loss"] = f"{losses[0]:.3f}"
        elif any(self.alive):
            best = int(np.argmin(np.nan_to_num(losses, nan=math.inf)))
            facts["best"] = f"{losses[best]:.3f} ({self.members[best].setup.workdir.name})"
        if not all(self.alive):
            facts["diverged"] = f"{self.alive.count(False)}"
        line = next(filter(None, lines), None)
        if line:
            facts["tokens/s"] = f"{line['tokens_per_second'] or 0:,.0f}"
        if line and line["mfu"] is not None:
            facts["mfu"] = f"{line['mfu']:.1%}"
        self.advance(1, **facts)

    def is_good(self) -> bool:
        """Returns True if the newest step that was taken was not bad for any member that has not diverged."""
        return not any(member.bad_steps.bad_in_a_row for m, member in enumerate(self.members) if self.alive[m])

    def inherit(self, m: int, config: ConfigDict, source: int) -> None:
        """Continues the lines of a member with the learning rates of `config` and the smoothed loss of `source`."""
        self.members[m].set_schedule(config)
        self.members[m].smooth_loss = self.members[source].smooth_loss
        self.alive[m] = self.alive[source]

    def write(self, lines: Sequence[Line], more: Sequence[Line] = ()) -> None:
        """Writes each line that is not empty, with the metrics of its member in `more`."""
        for m, line in enumerate(lines):
            if line:
                self.on_line(m, self.members[m].write(line | (more[m] if more else {})))


def _is_objective_metric(name: str) -> bool:
    """Returns True for a metric of the objective other than the loss."""
    return name not in ("loss", "grad_norm", *skip_step.METRICS) and not name.startswith(run_stats.PREFIX)


def _is_not_json(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
