"""Counts the FLOPs of a program's matrix products by scope, from the shapes in its jaxpr."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gptjax.planning.modules import Scope, scope_of


def flops_by_scope(jaxpr: Any) -> Counter[Scope]:
    """Returns the FLOPs of every `dot_general` and `ragged_dot`, 2 for a multiply-add.

    The body of a scan counts once per iteration, that of a `shard_map` once per device, and of a conditional the most
    expensive branch counts. Masked products count in full, and so do ragged ones with rows of other devices. The body
    of a while loop counts once, since its length is unknown.

    Args:
      jaxpr: jaxpr of the program, closed or not.
    """
    return _count(jaxpr, "")


def _count(jaxpr: Any, outer: str) -> Counter[Scope]:
    total: Counter[Scope] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        path = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name in FLOPS:
            total[scope_of(path)] += FLOPS[eqn.primitive.name](eqn)
        nested = [_count(inner, path) for inner in _inside(eqn.params)]
        if eqn.primitive.name == "cond":
            nested = [max(nested, key=lambda flops: flops.total())]
        repeats = _repeats(eqn)
        for counts in nested:
            for scope, flops in counts.items():
                total[scope] += flops * repeats
    return total


def _repeats(eqn: Any) -> int:
    if eqn.primitive.name == "shard_map":  # inner shapes are those of one device along the manual axes
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one


def _dense(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * math.prod(eqn.outvars[0].aval.shape) * summed


def _ragged(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    out = math.prod(eqn.outvars[0].aval.shape)
    # If rows are contracted, each contributes to the result of one group only.
    groups = eqn.invars[2].aval.shape[-1] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
    return 2 * out * summed // groups


FLOPS = {"dot_general": _dense, "ragged_dot_general": _ragged}
