"""Runs beside each other: directories as tables, what their configs differ in, and whether a difference is by chance.

Reads run directories and writes nothing. Runs whose losses do not mean the same are refused.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import models
from gptjax.config.errors import DataError
from gptjax.data import batches
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.runs import directory as workdirs
from gptjax.training.monitoring import metrics, report, run_stats, writers

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}  # what a curve is drawn over
MEASURES = {"loss": "held-out loss (nats per token)", "bits_per_byte": "held-out bits per byte"}
LONGEST_NAME = 60  # letters of a group's name that tells its values; else it is a directory
SIGNIFICANT = 0.01  # p below which a difference counts, as records of the GPT speed-runs ask for


@dataclasses.dataclass(frozen=True)
class Table:
    """A run as columns.

    Attributes:
      workdir: its directory.
      config: resolved.
      fingerprints: of its texts.
      tokenizer: SHA-256 of it.
      columns: float arrays as long as metrics.jsonl: "step", "seconds", "tokens" and "flops" until then (those of
        gptjax.training.monitoring.metrics.MFU_CONVENTION), "train/loss", "val/loss" and "val/bits_per_byte", nan where
        a line has none.
      summary: of a finished run; else None.
    """

    workdir: Path
    config: ConfigDict
    fingerprints: dict[str, str]
    tokenizer: str
    columns: dict[str, np.ndarray]
    summary: dict[str, Any] | None

    def looks(self, measure: str) -> np.ndarray:
        """Of which lines the held-out text was looked at, with that measure: bool."""
        return ~np.isnan(self.columns[f"val/{measure}"])

    def end(self, measure: str) -> float | None:
        """What all held-out text gave at the end; None where the run is not finished."""
        return None if self.summary is None else self.summary.get(f"val_{measure}")


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Table]


class WelchTest(NamedTuple):
    """Whether two groups differ by more than chance: Welch's t-test, of both sides."""

    first: str
    second: str
    difference: float  # of the means, first - second
    p: float | None  # None where it cannot be told: a group of one run, or no spread at all


def read(workdir: Path) -> Table:
    """A run's table.

    Raises:
      CheckpointError: it is no run, or damaged.
      DataError: it has no metrics: nothing was trained there.
    """
    config, lines = workdirs.read_config(workdir), writers.read_metrics(workdir)
    facts = workdirs.read_data_facts(workdir)
    if not lines or facts["fingerprints"] is None:
        raise DataError(f"{workdir} has no metrics to compare: train it first")
    names = ("step", "seconds", "train/loss", "val/loss", "val/bits_per_byte")
    columns = {name: np.array([_number(line.get(name)) for line in lines]) for name in names}
    tokens = tokens_until(config, columns["step"])
    columns |= {"tokens": tokens.sum(-1), "flops": tokens @ flops_per_token(config)}
    known = tokenizers.sha256(tokenizers.load(workdir / "tokenizer"))
    return Table(workdir, config, facts["fingerprints"], known, columns, report.read_summary(workdir))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def norms(workdir: Path, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `log.statistics` wrote down, {group: (steps, values)}; empty where a run was trained without.

    Args:
      workdir: the run's.
      name: one of gptjax.training.monitoring.run_stats.NAMES: "parameters", "updates" or "ratio".
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for line in writers.read_metrics(workdir):
        for key, value in line.items():
            if key.startswith(run_stats.PREFIX) and key.endswith(f"/{name}"):
                group = key.removeprefix(run_stats.PREFIX).removesuffix(f"/{name}")
                found.setdefault(group, []).append((line["step"], _number(value)))
    return {group: (np.array(own)[:, 0], np.array(own)[:, 1]) for group, own in found.items()}


def tokens_until(config: ConfigDict, steps_N: np.ndarray) -> np.ndarray:
    """Tokens that a run has read after so many steps, in each of its stages: [N, stages]."""
    stages = batches.stages(config.data)
    starts = np.array([stage.start for stage in stages])
    lengths = np.diff(np.append(starts, np.inf))
    taken = np.clip(np.asarray(steps_N)[:, None] - starts, 0, lengths)
    return taken * np.array([stage.batch_size * stage.context for stage in stages])


def flops_per_token(config: ConfigDict) -> np.ndarray:
    """Of forward and backward pass, in each stage: [stages], by gptjax.training.monitoring.metrics.MFU_CONVENTION."""
    shapes = models.shapes(methods.model_of(config))
    return np.array(
        [metrics.flops_per_token(shapes, config.model, stage.context) for stage in batches.stages(config.data)]
    )


def comparable(runs: Sequence[Table]) -> str:
    """The measure by which runs can be compared: loss, or bits_per_byte where their tokenizers differ.

    Raises:
      DataError: fewer than two, their objectives or texts differ, or there is no measure that all of them have.
    """
    if len(runs) < 2:
        raise DataError("there is one run; give two or more to compare")
    first = runs[0]
    for other in runs[1:]:
        both = f"{first.workdir} and {other.workdir} cannot be compared"
        if first.config.train.objective != other.config.train.objective:
            one, two = first.config.train.objective, other.config.train.objective
            raise DataError(f"{both}: their objectives are {one} and {two}")
        if first.fingerprints != other.fingerprints:
            raise DataError(f"{both}: they were trained and measured on different text or another division of it")
    measure = "loss" if len({run.tokenizer for run in runs}) == 1 else "bits_per_byte"
    for run in runs:
        if not run.looks(measure).any():
            why = "" if measure == "loss" else ", which runs with different tokenizers need"
            raise DataError(f"{run.workdir} cannot be compared: its metrics have no held-out {measure}{why}")
    return measure


def group_runs(runs: Sequence[Table]) -> list[Group]:
    """Runs that differ in seed alone together, in the order in which they come; each group named by what is its own."""
    together: list[list[Table]] = []
    for run in runs:
        own = next((group for group in together if _is_same_but_seed(group[0].config, run.config)), None)
        if own is None:
            together.append([run])
        else:
            own.append(run)
    if len(together) == 1:
        return [Group(str(runs[0].workdir), together[0])]
    values = config_differences([group[0] for group in together])
    names = [
        ", ".join(f"{key.split('.')[-1]}={own[number]}" for key, own in values.items())
        for number in range(len(together))
    ]
    tells = len(set(names)) == len(names) and max(map(len, names)) <= LONGEST_NAME
    return [Group(names[i] if tells else str(group[0].workdir), group) for i, group in enumerate(together)]


def _is_same_but_seed(one: ConfigDict, other: ConfigDict) -> bool:
    return all(line.startswith("seed ") for line in configs.differences(one, other))


def config_differences(runs: Sequence[Table]) -> dict[str, list[Any]]:
    """{key: its value in each run} of the keys in which the configs differ, but for the seed."""
    keys = {
        line.split(" ", 1)[0]
        for one, other in itertools.pairwise(runs)
        for line in configs.differences(one.config, other.config)
    }
    flat = [configs.flatten(run.config) for run in runs]
    return {key: [own.get(key, "absent") for own in flat] for key in sorted(keys - {"seed"})}


def final_values(group: Group, measure: str) -> list[float]:
    """What the finished runs of a group gave at the end."""
    return [value for run in group.runs if (value := run.end(measure)) is not None]


def welch(groups: Sequence[Group], measure: str) -> list[WelchTest]:
    """Each two groups that have finished runs, tested for different means (B. L. Welch, Biometrika 34, 1947)."""
    from scipy import stats

    found = []
    for one, two in itertools.combinations(groups, 2):
        first, second = final_values(one, measure), final_values(two, measure)
        if not first or not second:
            continue
        p = math.nan
        if min(len(first), len(second)) > 1 and np.var(first) + np.var(second) > 0:
            p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
        difference = float(np.mean(first) - np.mean(second))
        found.append(WelchTest(one.name, two.name, difference, None if math.isnan(p) else p))
    return found
