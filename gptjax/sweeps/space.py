"""Search spaces: a list of values or a range for each key, from `--set KEY=...`."""

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gptjax.config import recipes
from gptjax.config.errors import ConfigError
from gptjax.runs import config as configs

Values = dict[str, Any]  # of a trial, by swept key, such as "optimizer.learning_rate"


class Range(NamedTuple):
    """A closed interval of numbers.

    Attributes:
      kind: log (log-uniform), lin (uniform) or int (uniform over integers).
      low, high: the bounds, of the key's type.
    """

    kind: str
    low: float
    high: float

    @property
    def is_integer(self) -> bool:
        """True if only integers are drawn."""
        return self.kind == "int" or isinstance(self.low, int)

    def draw(self, rng: np.random.Generator) -> float:
        """Draws one number of the bounds' type."""
        kind = type(self.low)
        if self.kind == "log":
            edge = 0.5 if self.is_integer else 0.0  # gives each integer its share, including the bounds
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
    """Reads the space from `--set` flags; values get the type of their key in the recipe.

    Args:
      sets: such as "seed=0,1,2" or "optimizer.learning_rate=log:1e-4..1e-2".
      recipe, overrides: see gptjax.runs.config.read.

    Raises:
      ConfigError: a key that does not exist, is given twice or is also set by a flag; a value of another type; no
        value.
    """
    space: Space = {}
    keys = configs.flatten(configs.read(recipe, overrides))
    for one in sets:
        key, equals, text = one.partition("=")
        if not equals:
            raise ConfigError(f"--set {one}: it must be KEY=VALUE,VALUE,... or KEY=log:LOW..HIGH (lin:, int:)")
        recipes.check_keys([f"--config.{key}="], keys)
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
    texts = _split(text)
    if not all(texts):
        raise ConfigError(f"--set {key}={text}: " + ("a value is empty" if any(texts) else "the list is empty"))
    values = tuple(_typed(key, one, recipe) for one in texts)
    duplicates = [one for number, one in enumerate(texts) if values[number] in values[:number]]
    if duplicates:
        raise ConfigError(f"--set {key} has {duplicates[0]} twice")
    return values


def _range(key: str, kind: str, low: Any, high: Any) -> Range:
    ends, interval = (low, high), Range(kind, low, high)
    if not all(type(end) in (int, float) and math.isfinite(end) for end in ends):
        raise ConfigError(f"--set {key}={interval}: {key} is not a number; give a list")
    if not low < high:
        raise ConfigError(f"--set {key}={interval}: the range is empty; give the lower bound first")
    if kind == "log" and low <= 0:
        raise ConfigError(f"--set {key}={interval}: a log range must start above 0")
    if kind == "int" and any(end != round(end) for end in ends):
        raise ConfigError(f"--set {key}={interval}: an int range needs integer bounds")
    return interval


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes: ((10,8,64),),() has two parts."""
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
    """Parses text like `--config.KEY=text`."""
    plain = configs.flatten(configs.read(recipe))[key]
    try:
        return configs.flatten(configs.read(recipe, [f"--config.{key}={text}"]))[key]
    except ConfigError as error:
        raise ConfigError(f"--set {key}: {text!r} is of another type than the recipe's {plain!r}") from error


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns a locked copy of the config with these values.

    Raises:
      ConfigError: an unknown key, or a value of another type.
    """
    recipes.check_keys([f"--config.{key}=" for key in values], configs.flatten(config))
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
    """Lists every combination of values; the last key changes fastest.

    Raises:
      ConfigError: a range, which cannot be listed.
    """
    for key, axis in space.items():
        if isinstance(axis, Range):
            raise ConfigError(f"{key}={axis} is a range; give --random=N or --optuna=N too, or a list of values")
    lists = [[(key, value) for value in axis] for key, axis in space.items() if not isinstance(axis, Range)]
    return [dict(values) for values in itertools.product(*lists)]


def draw(space: Mapping[str, Axis], seed: int, number: int) -> Values:
    """Draws the values of trial `number`, independent of the other trials, so that adding trials changes none."""
    rng = np.random.default_rng([seed, number])
    return {
        key: axis.draw(rng) if isinstance(axis, Range) else axis[rng.integers(len(axis))] for key, axis in space.items()
    }


def is_log(values: Sequence[Any]) -> bool:
    """Returns True if two or more positive numbers are spaced more evenly on a log axis than on a linear one."""
    if len(set(values)) < 2 or any(type(value) not in (int, float) or value <= 0 for value in values):
        return False
    distinct = np.unique(np.array(values, float))
    if len(distinct) == 2:
        return bool(distinct[1] / distinct[0] >= 5)

    def unevenness(points: np.ndarray) -> float:
        gaps = np.diff(points)
        return float(gaps.std() / gaps.mean())

    return unevenness(np.log(distinct)) < unevenness(distinct)
