"""Which trials there are where no result decides it: a grid, random draws, a list of files. Trains nothing."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax.config.errors import ConfigError
from gptjax.core.files import read_json
from gptjax.sweeps import space as spaces
from gptjax.sweeps.space import Range, Space, Values


class Search(NamedTuple):
    """What a sweep looks through, and how.

    Attributes:
      recipe, overrides: of the config that all trials share; as of gptjax.config.read.
      space: what is swept.
      how: a name in CHOOSERS, or "optuna".
      wanted: of random and optuna: how many trials.
      seed: of random and optuna: decides what is drawn.
      files: of files: JSON objects of key: value, or recipes.
    """

    recipe: str
    overrides: Sequence[str]
    space: Space
    method: str = "grid"
    n_trials: int = 0
    seed: int = 0
    files: Sequence[str] = ()

    def config(self) -> ConfigDict:
        """What all trials share."""
        return configs.read(self.recipe, self.overrides)


class Trial(NamedTuple):
    """One run of a sweep: its values, its whole config and its directory."""

    values: Values
    config: ConfigDict
    workdir: Path

    @property
    def name(self) -> str:
        """The directory's, which follows from the values alone."""
        return self.workdir.name


def make_trial(config: ConfigDict, values: Mapping[str, Any], folder: Path) -> Trial:
    """The trial of these values, which get their keys' own types, in a sweep's directory."""
    config = spaces.with_values(config, values)
    typed = {key: configs.flatten(config)[key] for key in values}
    return Trial(typed, config, folder / "trials" / trial_name(typed))


def trial_name(values: Mapping[str, Any]) -> str:
    """Such as learning_rate=0.001,seed=0-3c9d0f21b7: to read, and a hash of the values that tells them apart."""
    text = json.dumps(dict(sorted(values.items())))
    shown = ",".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in values.items())
    return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', shown)[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def list_trials(search: Search, folder: Path) -> list[Trial]:
    """All trials of a sweep whose trials no result decides, each values' once.

    Raises:
      ConfigError, DataError: there is none, or one cannot be.
    """
    config = search.config()
    found = SEARCH_METHODS[search.method](search)
    if not found:
        raise ConfigError("nothing is swept; give --set KEY=VALUE,VALUE,... or --files=A,B,...")
    trials = [make_trial(config, values, folder) for values in found]
    return list({one.name: one for one in trials}.values())


def grid(search: Search) -> list[Values]:
    """Every combination."""
    return spaces.grid(search.space) if search.space else []


def random(search: Search) -> list[Values]:
    """`wanted` draws; where all keys have lists, values that are drawn again count once."""
    if not search.space:
        raise ConfigError("--random draws from --set KEY=log:LOW..HIGH (lin:, int:) or lists; give one")
    return [spaces.draw(search.space, search.seed, number) for number in range(search.n_trials)]


def from_files(search: Search) -> list[Values]:
    """What each file says, combined with every combination of the swept lists.

    All have the same keys: where a file does not name one that another names, it has the recipe's value.
    """
    known = configs.flatten(search.config())
    said = [_values_of(path, search.overrides, known) for path in search.files]
    keys = {key: known[key] for values in said for key in values}
    twice = keys.keys() & search.space.keys()
    if twice:
        raise ConfigError(f"{min(twice)} is in a file of --files and in --set; leave one of them out")
    return [keys | values | more for values in said for more in spaces.grid(search.space)]


def _values_of(path: str, overrides: Sequence[str], known: Mapping[str, Any]) -> Values:
    if not path.endswith(".json"):
        theirs = configs.flatten(configs.read(path, overrides))
        strange = theirs.keys() ^ known.keys()
        if strange:
            raise ConfigError(f"{path} and --config do not have the same keys: {min(strange)}")
        return {key: value for key, value in theirs.items() if value != known[key]}
    values = configs.flatten(read_json(Path(path)))
    try:
        configs.check_keys([f"--config.{key}=" for key in values], dict(known))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


SEARCH_METHODS: dict[str, Callable[[Search], list[Values]]] = {"grid": grid, "random": random, "files": from_files}


def search_signature(search: Search) -> dict[str, str]:
    """What of a search stays the same when it goes on: lists of a grid may get longer, and more trials be wanted."""
    if search.method in ("grid", "files"):
        return {"how": search.method, "keys": " ".join(search.space)}
    axes = {key: str(axis) if isinstance(axis, Range) else json.dumps(axis) for key, axis in search.space.items()}
    return {"how": search.method, "seed": str(search.seed), **{f"--set {key}": axis for key, axis in axes.items()}}
