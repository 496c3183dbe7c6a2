"""What is swept: for each key a list of values or a range, read from `--set KEY=...`. Knows configs, trains nothing."""

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax.config.errors import ConfigError

Values = dict[str, Any]  # swept keys, such as "optimizer.learning_rate", and what a trial has there


class Range(NamedTuple):
    """Numbers between two ends, both included.

    Attributes:
      kind: log (uniform in the logarithm), lin (uniform) or int (uniform over whole numbers).
      low, high: the ends, of the key's own type.
    """

    kind: str
    low: float
    high: float

    @property
    def is_integer(self) -> bool:
        """Whether only whole numbers are drawn."""
        return self.kind == "int" or isinstance(self.low, int)

    def draw(self, rng: np.random.Generator) -> float:
        """One number, of the ends' type."""
        kind = type(self.low)
        if self.kind == "log":
            edge = 0.5 if self.is_integer else 0.0  # so that each whole number gets its own share, the ends too
            low, high = math.log(self.low - edge), math.log(self.high + edge)
            drawn = math.exp(rng.uniform(low, high))
            return kind(min(max(round(drawn) if self.is_integer else drawn, self.low), self.high))
        if self.is_integer:
            return kind(rng.integers(round(self.low), round(self.high), endpoint=True))
        return kind(rng.uniform(self.low, self.high))

    def __str__(self) -> str:
        return f"{self.kind}:{self.low}..{self.high}"


Axis = tuple[Any, ...] | Range
Space = dict[str, Axis]


def read(sets: Sequence[str], recipe: str, overrides: Sequence[str]) -> Space:
    """The space of `--set` flags, each value of the type that its key has in the recipe.

    Args:
      sets: such as "seed=0,1,2" or "optimizer.learning_rate=log:1e-4..1e-2".
      recipe, overrides: as of gptjax.config.read.

    Raises:
      ConfigError: a key that does not exist, is given twice or is set besides; a value of another type; no value.
    """
    space: Space = {}
    known = configs.flatten(configs.read(recipe, overrides))
    for one in sets:
        key, equals, text = one.partition("=")
        if not equals:
            raise ConfigError(f"--set {one}: it must be KEY=VALUE,VALUE,... or KEY=log:LOW..HIGH (lin:, int:)")
        configs.check_keys([f"--config.{key}="], known)
        if key in space:
            raise ConfigError(f"--set {key} is given twice; give one list")
        if any(flag.split("=", 1)[0] == f"--config.{key}" for flag in overrides):
            raise ConfigError(f"{key} is swept and set by --config.{key}; leave one of them out")
        space[key] = _axis(key, text, recipe)
    return space


def _axis(key: str, text: str, recipe: str) -> Axis:
    if match := re.fullmatch(r"(log|lin|int):(.*)\.\.(.*)", text):
        kind, low, high = match.groups()
        return _range(key, kind, _typed(key, low, recipe), _typed(key, high, recipe))
    texts = _divided(text)
    if not all(texts):
        raise ConfigError(f"--set {key}={text}: " + ("a value is empty" if any(texts) else "the list is empty"))
    values = tuple(_typed(key, one, recipe) for one in texts)
    twice = [one for number, one in enumerate(texts) if values[number] in values[:number]]
    if twice:
        raise ConfigError(f"--set {key} has {twice[0]} twice")
    return values


def _range(key: str, kind: str, low: Any, high: Any) -> Range:
    ends, found = (low, high), Range(kind, low, high)
    if not all(type(end) in (int, float) and math.isfinite(end) for end in ends):
        raise ConfigError(f"--set {key}={found}: {key} holds no numbers; give a list")
    if not low < high:
        raise ConfigError(f"--set {key}={found}: the range is empty; give the lower end first")
    if kind == "log" and low <= 0:
        raise ConfigError(f"--set {key}={found}: a log range begins above 0")
    if kind == "int" and any(end != round(end) for end in ends):
        raise ConfigError(f"--set {key}={found}: an int range has whole ends")
    return found


def _divided(text: str) -> list[str]:
    """Parts between commas that are in no brackets and no quotes: ((10,8,64),),() is two."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _typed(key: str, text: str, recipe: str) -> Any:
    """The value that `--config.KEY=text` gives."""
    plain = configs.flatten(configs.read(recipe))[key]
    try:
        return configs.flatten(configs.read(recipe, [f"--config.{key}={text}"]))[key]
    except ConfigError as error:
        raise ConfigError(f"--set {key}: {text!r} is of another type than the recipe's {plain!r}") from error


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with these values, locked.

    Raises:
      ConfigError: a key that it does not have, or a value of another type.
    """
    configs.check_keys([f"--config.{key}=" for key in values], configs.flatten(config))
    config = copy.deepcopy(config)
    for key, value in values.items():
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        try:
            section[last] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}={value!r} is of another type than the recipe's {section[last]!r}") from error
    return config.lock()


def grid(space: Mapping[str, Axis]) -> list[Values]:
    """Every combination of the lists, the last key's values changing first.

    Raises:
      ConfigError: a range, which has no end of values.
    """
    for key, axis in space.items():
        if isinstance(axis, Range):
            raise ConfigError(f"{key}={axis} is a range; give --random=N or --optuna=N too, or a list of values")
    lists = [[(key, value) for value in axis] for key, axis in space.items() if not isinstance(axis, Range)]
    return [dict(chosen) for chosen in itertools.product(*lists)]


def draw(space: Mapping[str, Axis], seed: int, number: int) -> Values:
    """The values of a draw; it depends on no other draw, so that more of them leave the first ones as they are."""
    rng = np.random.default_rng([seed, number])
    return {
        key: axis.draw(rng) if isinstance(axis, Range) else axis[rng.integers(len(axis))] for key, axis in space.items()
    }


def is_log(values: Sequence[Any]) -> bool:
    """Whether values, at least two, are numbers that lie more evenly on a logarithmic axis than on a plain one."""
    if len(set(values)) < 2 or any(type(value) not in (int, float) or value <= 0 for value in values):
        return False
    found = np.unique(np.array(values, float))
    if len(found) == 2:
        return bool(found[1] / found[0] >= 5)

    def unevenness(points: np.ndarray) -> float:
        gaps = np.diff(points)
        return float(gaps.std() / gaps.mean())

    return unevenness(np.log(found)) < unevenness(found)
