"""Trials that do not depend on results: a grid, random draws, or a list of files."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gptjax.config import recipes
from gptjax.config.errors import ConfigError
from gptjax.core.files import read_json
from gptjax.runs import config as configs
from gptjax.sweeps import space as spaces
from gptjax.sweeps.space import Range, Space, Values


class Search(NamedTuple):
    """The search of a sweep.

    Attributes:
      recipe, overrides: of the config that all trials share; see gptjax.runs.config.read.
      space: the swept keys.
      method: a name in SEARCH_METHODS, or "optuna".
      n_trials: number of trials, for random and optuna.
      seed: of the draws, for random and optuna.
      files: JSON objects {key: value}, or recipes, for files.
    """

    recipe: str
    overrides: Sequence[str]
    space: Space
    method: str = "grid"
    n_trials: int = 0
    seed: int = 0
    files: Sequence[str] = ()

    def config(self) -> ConfigDict:
        """Reads the config that all trials share."""
        return configs.read(self.recipe, self.overrides)


class Trial(NamedTuple):
    """One run of a sweep: its values, its whole config and its directory."""

    values: Values
    config: ConfigDict
    workdir: Path

    @property
    def name(self) -> str:
        """Name of the directory, a function of the values."""
        return self.workdir.name


def make_trial(config: ConfigDict, values: Mapping[str, Any], folder: Path) -> Trial:
    """Makes the trial with these values, converted to the types of their keys, in a sweep's directory."""
    config = spaces.with_values(config, values)
    typed = {key: configs.flatten(config)[key] for key in values}
    return Trial(typed, config, folder / "trials" / trial_name(typed))


def trial_name(values: Mapping[str, Any]) -> str:
    """Names a trial such as learning_rate=0.001,seed=0-3c9d0f21b7: readable values and a hash that is unique."""
    text = json.dumps(dict(sorted(values.items())))
    shown = ",".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in values.items())
    return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', shown)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def list_trials(search: Search, folder: Path) -> list[Trial]:
    """Lists all trials of a sweep, without duplicates.

    Raises:
      ConfigError, DataError: there are no trials, or one is invalid.
    """
    config = search.config()
    all_values = SEARCH_METHODS[search.method](search)
    if not all_values:
        raise ConfigError("nothing is swept; give --set KEY=VALUE,VALUE,... or --files=A,B,...")
    trials = [make_trial(config, values, folder) for values in all_values]
    return list({one.name: one for one in trials}.values())


def grid(search: Search) -> list[Values]:
    """Lists every combination of values."""
    return spaces.grid(search.space) if search.space else []


def random(search: Search) -> list[Values]:
    """Draws `n_trials` trials; with lists for all keys, duplicates count once."""
    if not search.space:
        raise ConfigError("--random draws from --set KEY=log:LOW..HIGH (lin:, int:) or lists; give one")
    return [spaces.draw(search.space, search.seed, number) for number in range(search.n_trials)]


def from_files(search: Search) -> list[Values]:
    """Combines the values of each file with every combination of the swept lists.

    All trials have the same keys; a key that only other files set has the recipe's value.
    """
    defaults = configs.flatten(search.config())
    file_values = [_values_of(path, search.overrides, defaults) for path in search.files]
    keys = {key: defaults[key] for values in file_values for key in values}
    duplicates = keys.keys() & search.space.keys()
    if duplicates:
        raise ConfigError(f"{min(duplicates)} is in a file of --files and in --set; leave one of them out")
    return [keys | values | more for values in file_values for more in spaces.grid(search.space)]


def _values_of(path: str, overrides: Sequence[str], defaults: Mapping[str, Any]) -> Values:
    if not path.endswith(".json"):
        values = configs.flatten(configs.read(path, overrides))
        different = values.keys() ^ defaults.keys()
        if different:
            raise ConfigError(f"{path} and --config do not have the same keys: {min(different)}")
        return {key: value for key, value in values.items() if value != defaults[key]}
    values = configs.flatten(read_json(Path(path)))
    try:
        recipes.check_keys([f"--config.{key}=" for key in values], dict(defaults))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


SEARCH_METHODS: dict[str, Callable[[Search], list[Values]]] = {"grid": grid, "random": random, "files": from_files}


def search_signature(search: Search) -> dict[str, str]:
    """Returns the facts of a search that may not change when it resumes: lists may grow, and n_trials increase."""
    if search.method in ("grid", "files"):
        return {"how": search.method, "keys": " ".join(search.space)}
    axes = {key: str(axis) if isinstance(axis, Range) else json.dumps(axis) for key, axis in search.space.items()}
    return {"how": search.method, "seed": str(search.seed), **{f"--set {key}": axis for key, axis in axes.items()}}
