"""FLOPs of the matrix products in a program, by where they come from, counted from shapes before XLA sees it."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gptjax.planning.modules import Place, place


def flops_by_place(jaxpr: Any) -> Counter[Place]:
    """FLOPs of every `dot_general` and `ragged_dot` that a run of the program does, two for a multiply and an add.

    A scan counts as often as it is long, what each device does by itself as often as there are devices, and of a
    condition the branch that costs most. A product of which a mask hides a part counts in full, and so does a ragged
    one where some of its rows are another device's. The body of a while loop counts once: its length is not known.

    Args:
      jaxpr: of the program, closed or not.
    """
    return _count(jaxpr, "")


def _count(jaxpr: Any, outer: str) -> Counter[Place]:
    total: Counter[Place] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        path = f"{outer}/{eqn.source_info.name_stack}"
        if eqn.primitive.name in FLOPS:
            total[place(path)] += FLOPS[eqn.primitive.name](eqn)
        within = [_count(inner, path) for inner in _inside(eqn.params)]
        if eqn.primitive.name == "cond":
            within = [max(within, key=lambda counted: counted.total())]
        often = _repeats(eqn)
        for counted in within:
            for where, flops in counted.items():
                total[where] += flops * often
    return total


def _repeats(eqn: Any) -> int:
    if eqn.primitive.name == "shard_map":  # shapes within are one device's, along the axes that it divides by hand
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
    # Rows are summed up group by group: each goes to one of the groups' results, not to all.
    groups = eqn.invars[2].aval.shape[-1] if set(numbers.lhs_ragged_dimensions) & set(contracted) else 1
    return 2 * out * summed // groups


FLOPS = {"dot_general": _dense, "ragged_dot_general": _ragged}
