"""Maps operations and parameters to parts of a train step by the path of their Linen modules.

JAX keeps the path in the name stack of a jaxpr's equations, and XLA in the `op_name` of its instructions:
`jit(step)/transpose(jvp(GPT))/GPT._through_blocks/block_3/attention/qkv/dot_general`. Only names are used.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OTHER = "everything else"
BETWEEN_DEVICES = "collectives"  # including waiting for them
OF_BLOCK = ("attention", "mlp")
REST_OF_BLOCK = "norms & residual"
BETWEEN = "between blocks"  # shared by blocks, such as rotary tables, and the copies of a scan over layers
IDLE = "idle"  # no operation runs: allocation, dispatch, or other load of the machine
BEFORE = ("tokens", "positions")
AFTER = ("final_norm", "head", "loss", "accumulation", "optimizer", OTHER)
# Part by the last word of a module's, method's or name scope's name.
KNOWN = {name: name for name in (*BEFORE, *AFTER)} | {"_through_blocks": BETWEEN}


class Scope(NamedTuple):
    """Part of a train step, in its forward or backward pass."""

    part: str
    backward: bool


def part_of(path: str) -> str:
    """Returns the part of a path of modules; `OTHER` if it has no known name.

    Inside a block the block's submodule decides, elsewhere the innermost known name.
    """
    words = re.split(r"[/()]", path)
    for at, word in enumerate(words):
        if re.fullmatch(r"block_\d+|blocks", word):
            inner = words[at + 1] if at + 1 < len(words) else ""
            return f"{word} {inner if inner in OF_BLOCK else REST_OF_BLOCK}"
    last_words = [word.split(".")[-1] for word in words]
    return next((KNOWN[word] for word in reversed(last_words) if word in KNOWN), OTHER)


def scope_of(path: str) -> Scope:
    """Returns the scope of a path; rematerialized operations belong to the backward pass."""
    return Scope(part_of(path), "transpose(" in path or "rematted_computation" in path)


def sort_parts(parts: Iterable[str]) -> list[str]:
    """Sorts parts in the order of the forward pass."""
    parts = set(parts)
    blocks = sorted({part.split()[0] for part in parts if re.match(r"block(s|_\d+) ", part)}, key=_number)
    inner = [f"{block} {part}" for block in blocks for part in (*OF_BLOCK, REST_OF_BLOCK)]
    return [part for part in (*BEFORE, *inner, BETWEEN, *AFTER[:-1], BETWEEN_DEVICES, OTHER, IDLE) if part in parts]


def _number(block: str) -> int:
    return int(block.removeprefix("block_")) if block != "blocks" else 0


def majority(scopes: Sequence[Scope], default: Scope) -> Scope:
    """Returns the scope of most of a fusion's operations; `default` if none is known or others are not more.

    Args:
      scopes: scopes of its operations.
      default: scope of the fusion's name.
    """
    candidates = [scope for scope in scopes if scope.part != OTHER]
    most = max(candidates, key=candidates.count, default=default)
    is_tied = candidates.count(default) == candidates.count(most)
    return default if default.part != OTHER and is_tied else most
