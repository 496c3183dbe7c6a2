"""Tables of runs: their metrics, the differences of their configs, and significance tests between groups.

Reads run directories and writes nothing. Runs whose losses are not comparable are refused.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gptjax import models
from gptjax.config.errors import DataError
from gptjax.data import batches
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.runs import config as configs
from gptjax.runs import directory as workdirs
from gptjax.runs import writers
from gptjax.training.monitoring import metrics, report, run_stats

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}  # horizontal axes of curves
MEASURES = {"loss": "held-out loss (nats per token)", "bits_per_byte": "held-out bits per byte"}
LONGEST_NAME = 60  # characters of a group's name made of its values; a longer one is replaced by a directory
SIGNIFICANT = 0.01  # p below which a difference is significant, as for records of the GPT speedruns


@dataclasses.dataclass(frozen=True)
class Table:
    """The metrics of a run as columns.

    Attributes:
      workdir: its directory.
      config: resolved.
      fingerprints: of its texts.
      tokenizer: SHA-256 of it.
      columns: float arrays with one value per line of metrics.jsonl: "step", and up to then "seconds", "tokens" and
        "flops" (by gptjax.training.monitoring.metrics.MFU_CONVENTION); "train/loss", "val/loss" and
        "val/bits_per_byte", nan where a line has none.
      summary: of a finished run; otherwise None.
    """

    workdir: Path
    config: ConfigDict
    fingerprints: dict[str, str]
    tokenizer: str
    columns: dict[str, np.ndarray]
    summary: dict[str, Any] | None

    def has_measure(self, measure: str) -> np.ndarray:
        """Boolean mask of the lines with this measure on held-out text."""
        return ~np.isnan(self.columns[f"val/{measure}"])

    def final_value(self, measure: str) -> float | None:
        """The measure on all held-out text at the end; None if the run is not finished."""
        return None if self.summary is None else self.summary.get(f"val_{measure}")


class Group(NamedTuple):
    """Runs that differ only in their seed."""

    name: str
    runs: list[Table]


class WelchTest(NamedTuple):
    """Result of a two-sided Welch's t-test between two groups."""

    first: str
    second: str
    difference: float  # of the means, first - second
    p: float | None  # None for a group of one run, or without variance


def read(workdir: Path) -> Table:
    """Reads the table of a run.

    Raises:
      CheckpointError: it is not a run, or damaged.
      DataError: it has no metrics, because nothing was trained.
    """
    config, lines = workdirs.read_config(workdir), writers.read_metrics(workdir)
    facts = workdirs.read_data_facts(workdir)
    if not lines or facts["fingerprints"] is None:
        raise DataError(f"{workdir} has no metrics to compare: train it first")
    names = ("step", "seconds", "train/loss", "val/loss", "val/bits_per_byte")
    columns = {name: np.array([_number(line.get(name)) for line in lines]) for name in names}
    tokens = tokens_until(config, columns["step"])
    columns |= {"tokens": tokens.sum(-1), "flops": tokens @ flops_per_token(config)}
    tokenizer = tokenizers.sha256(tokenizers.load(workdir / "tokenizer"))
    return Table(workdir, config, facts["fingerprints"], tokenizer, columns, report.read_summary(workdir))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def norms(workdir: Path, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the statistics of `log.statistics`, {group: (steps, values)}; empty if the run has none.

    Args:
      workdir: of the run.
      name: one of gptjax.training.monitoring.run_stats.NAMES: "parameters", "updates" or "ratio".
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for line in writers.read_metrics(workdir):
        for key, value in line.items():
            if key.startswith(run_stats.PREFIX) and key.endswith(f"/{name}"):
                group = key.removeprefix(run_stats.PREFIX).removesuffix(f"/{name}")
                points.setdefault(group, []).append((line["step"], _number(value)))
    return {group: (np.array(pairs)[:, 0], np.array(pairs)[:, 1]) for group, pairs in points.items()}


def tokens_until(config: ConfigDict, steps_N: np.ndarray) -> np.ndarray:
    """Number of tokens after each of these steps, per stage: [N, stages]."""
    stages = batches.stages(config.data)
    starts = np.array([stage.start for stage in stages])
    lengths = np.diff(np.append(starts, np.inf))
    steps_of_stage = np.clip(np.asarray(steps_N)[:, None] - starts, 0, lengths)
    return steps_of_stage * np.array([stage.batch_size * stage.context for stage in stages])


def flops_per_token(config: ConfigDict) -> np.ndarray:
    """FLOPs per token in each stage, [stages], by gptjax.training.monitoring.metrics.MFU_CONVENTION."""
    shapes = models.shapes(methods.build_model(config))
    return np.array(
        [metrics.flops_per_token(shapes, config.model, stage.context) for stage in batches.stages(config.data)]
    )


def comparable(runs: Sequence[Table]) -> str:
    """Returns the measure for a comparison: "loss", or "bits_per_byte" if the tokenizers differ.

    Raises:
      DataError: fewer than two runs, different objectives or texts, or no measure that all of them have.
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
            raise DataError(f"{both}: they were trained and evaluated on different text or another split of it")
    measure = "loss" if len({run.tokenizer for run in runs}) == 1 else "bits_per_byte"
    for run in runs:
        if not run.has_measure(measure).any():
            why = "" if measure == "loss" else ", which runs with different tokenizers need"
            raise DataError(f"{run.workdir} cannot be compared: its metrics have no held-out {measure}{why}")
    return measure


def group_runs(runs: Sequence[Table]) -> list[Group]:
    """Groups runs that differ only in their seed, in order; each group is named by its differing values."""
    groups: list[list[Table]] = []
    for run in runs:
        match = next((group for group in groups if _is_same_but_seed(group[0].config, run.config)), None)
        if match is None:
            groups.append([run])
        else:
            match.append(run)
    if len(groups) == 1:
        return [Group(str(runs[0].workdir), groups[0])]
    values = config_differences([group[0] for group in groups])
    names = [
        ", ".join(f"{key.split('.')[-1]}={by_group[number]}" for key, by_group in values.items())
        for number in range(len(groups))
    ]
    is_clear = len(set(names)) == len(names) and max(map(len, names)) <= LONGEST_NAME
    return [Group(names[i] if is_clear else str(group[0].workdir), group) for i, group in enumerate(groups)]


def _is_same_but_seed(one: ConfigDict, other: ConfigDict) -> bool:
    return all(line.startswith("seed ") for line in configs.differences(one, other))


def config_differences(runs: Sequence[Table]) -> dict[str, list[Any]]:
    """Returns {key: its value in each run} of the keys in which the configs differ, except the seed."""
    keys = {
        line.split(" ", 1)[0]
        for one, other in itertools.pairwise(runs)
        for line in configs.differences(one.config, other.config)
    }
    flat = [configs.flatten(run.config) for run in runs]
    return {key: [config.get(key, "absent") for config in flat] for key in sorted(keys - {"seed"})}


def final_values(group: Group, measure: str) -> list[float]:
    """Final values of the finished runs of a group."""
    return [value for run in group.runs if (value := run.final_value(measure)) is not None]


def welch(groups: Sequence[Group], measure: str) -> list[WelchTest]:
    """Tests each pair of groups with finished runs for different means (B. L. Welch, Biometrika 34, 1947)."""
    from scipy import stats

    tests = []
    for one, two in itertools.combinations(groups, 2):
        first, second = final_values(one, measure), final_values(two, measure)
        if not first or not second:
            continue
        p = math.nan
        if min(len(first), len(second)) > 1 and np.var(first) + np.var(second) > 0:
            p = float(stats.ttest_ind(first, second, equal_var=False).pvalue)
        difference = float(np.mean(first) - np.mean(second))
        tests.append(WelchTest(one.name, two.name, difference, None if math.isnan(p) else p))
    return tests
