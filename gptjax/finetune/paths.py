"""Parameters by path: trees as flat dictionaries, parted and put together. Knows no model and no method.

A path is the names of a parameter's modules and its own, "block_0/mlp/up/kernel"; a rule is a regular expression that
has to be found somewhere in it.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from flax import traverse_util

from gptjax.config.errors import ConfigError

Flat = dict[str, Any]


def flat(tree: Mapping[str, Any]) -> Flat:
    """{"block_0/mlp/up/kernel": leaf, ...} of nested dictionaries."""
    found: Flat = traverse_util.flatten_dict(tree, sep="/")
    return found


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round."""
    found: dict[str, Any] = traverse_util.unflatten_dict(leaves, sep="/")
    return found


def union(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """All leaves of both; what both have is the second's."""
    return nested(flat(tree) | flat(other))


def divided(tree: Mapping[str, Any], chosen: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the leaves at those paths, the others)."""
    leaves = flat(tree)
    own = {path: leaf for path, leaf in leaves.items() if path in chosen}
    return nested(own), nested({path: leaf for path, leaf in leaves.items() if path not in own})


def matching(paths: Iterable[str], rule: str, key: str) -> list[str]:
    """The paths in which the rule is found.

    Args:
      paths: to choose among.
      rule: a regular expression.
      key: of the config that it comes from, for the message.

    Raises:
      ConfigError: it is no regular expression, or it matches none.
    """
    try:
        expression = re.compile(rule)
    except re.error as error:
        raise ConfigError(f"{key}={rule!r} is no regular expression: {error}") from error
    paths = list(paths)
    found = [path for path in paths if expression.search(path)]
    if not found:
        some = ", ".join(sorted(paths)[:3])
        raise ConfigError(f"{key}={rule!r} matches no parameter; there are {some}, ... ({len(paths)} in all)")
    return found


def depth(path: str) -> int | None:
    """The number of the block or recurrent layer that a parameter is of; None: of none, or of all at once."""
    match = re.search(r"(?:^|/)(?:block|layer|forward|backward)_(\d+)/", path)
    return int(match[1]) if match else None
