"""Parameters by path: flattens, splits and joins trees. Independent of models and methods.

A path joins the names of a parameter's modules and its own, "block_0/mlp/up/kernel"; a rule is a regular expression
that is searched in it.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flax import traverse_util

from gptjax.config.errors import ConfigError

Flat = dict[str, Any]


def flat(tree: Mapping[str, Any]) -> Flat:
    """Flattens nested dictionaries to {"block_0/mlp/up/kernel": leaf, ...}."""
    leaves: Flat = traverse_util.flatten_dict(tree, sep="/")
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Unflattens {"block_0/mlp/up/kernel": leaf, ...} to nested dictionaries."""
    tree: dict[str, Any] = traverse_util.unflatten_dict(leaves, sep="/")
    return tree


def union(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Joins two trees; leaves of `other` take precedence."""
    return nested(flat(tree) | flat(other))


def split(tree: Mapping[str, Any], chosen: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into the leaves at the chosen paths and the others."""
    leaves = flat(tree)
    first = {path: leaf for path, leaf in leaves.items() if path in chosen}
    return nested(first), nested({path: leaf for path, leaf in leaves.items() if path not in first})


def matching(paths: Iterable[str], rule: str, key: str) -> list[str]:
    """Returns the paths that a rule matches.

    Args:
      paths: paths to search.
      rule: a regular expression.
      key: config key of the rule, for messages.

    Raises:
      ConfigError: the rule is no regular expression, or it matches no path.
    """
    try:
        expression = re.compile(rule)
    except re.error as error:
        raise ConfigError(f"{key}={rule!r} is no regular expression: {error}") from error
    paths = list(paths)
    matches = [path for path in paths if expression.search(path)]
    if not matches:
        some = ", ".join(sorted(paths)[:3])
        raise ConfigError(f"{key}={rule!r} matches no parameter; there are {some}, ... ({len(paths)} in all)")
    return matches


def depth(path: str) -> int | None:
    """Returns the index of a parameter's block or recurrent layer; None if it is in none, or layers are stacked."""
    match = re.search(r"(?:^|/)(?:block|layer|forward|backward)_(\d+)/", path)
    return int(match[1]) if match else None
