"""Results of training: the evaluation on all held-out text, samples, plot and summary of each member."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config.errors import Diverged
from gptjax.core import console
from gptjax.evals import held_out
from gptjax.runs.train_state import TrainState, parameter_count
from gptjax.sharding import processes
from gptjax.training import samples
from gptjax.training.monitoring import report
from gptjax.training.population.population import Population
from gptjax.training.setup import TrainSetup


def finish(
    population: Population, state: TrainState, done: Sequence[dict[str, Any] | None]
) -> list[dict[str, Any] | None]:
    """Evaluates on all held-out text; writes samples, plot and summary of each member that has not diverged."""
    setup, held_out_batches = population.first, population.first.batches.held_out
    params = population.map(TrainState.eval_params)(state)
    every_batch = (held_out_batches[i] for i in range(len(held_out_batches)))
    with console.bar("reading all held-out text", len(held_out_batches)) as advance, setup.clock.during("eval"):
        quality = population.evaluate_all(params, every_batch, advance)
    summaries = list(done)
    with console.bar("writing samples and plots", population.size) as advance:
        for m, member in enumerate(population.setups):
            if not summaries[m] and not has_diverged(population, state, m, quality[m]):
                summaries[m] = write_results(member, population.select(params, m), quality[m])
            advance()
    return summaries


def has_diverged(population: Population, state: TrainState, member: int, quality: Mapping[str, float]) -> bool:
    """Returns True if one of several members has diverged, in training or by its final loss."""
    in_a_row = int(population.select(state.guard.in_a_row, member))
    given_up = in_a_row >= population.first.config.guard.patience
    return population.size > 1 and (given_up or not math.isfinite(quality["loss"]))


def write_results(setup: TrainSetup, params: Any, quality: dict[str, float]) -> dict[str, Any]:
    """Writes samples, plot and summary of a run with these final parameters, and returns the summary.

    Raises:
      Diverged: the held-out loss is not finite.
    """
    c = setup.config
    if not math.isfinite(quality["loss"]):
        raise Diverged(f"training diverged: the held-out loss is {quality['loss']}; try a lower learning rate")
    if "bits_per_byte" in quality and not c.data.examples.form:  # with examples, only the answers are predicted
        quality |= held_out.compressors(setup.data.held_out_text)
    params = processes.gather(params)
    sample = samples.sample(setup, params)

    def write() -> dict[str, Any]:
        summary = report.summarize(setup.workdir, c.train.steps, parameter_count(params), quality)
        return report.write(setup.workdir, summary, sample, setup.clock)

    return processes.run_on_first(write, "the summary is written") or report.read_summary(setup.workdir) or {}
