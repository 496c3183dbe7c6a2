"""Which part of a train step an operation or a parameter belongs to, by the path of the Linen modules it came from.

JAX keeps that path in the name stack of a jaxpr's equations, and XLA in the `op_name` of its instructions:
`jit(step)/transpose(jvp(GPT))/GPT._through_blocks/block_3/attention/qkv/dot_general`. Only names are relied on.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ELSE = "everything else"
BETWEEN_DEVICES = "collectives"  # sums and copies between devices, and waiting for them
OF_BLOCK = ("attention", "mlp")
REST_OF_BLOCK = "norms & residual"
BETWEEN = "between blocks"  # what they share, such as rotary tables; the copies that a scan over layers makes
IDLE = "idle"  # no operation runs: buffers are being allocated, a step handed over, or the machine does other work
BEFORE = ("tokens", "positions")
AFTER = ("final_norm", "head", "loss", "accumulation", "optimizer", ELSE)
# The last word of a module's, method's or scope's name, by the part that it stands for.
KNOWN = {name: name for name in (*BEFORE, *AFTER)} | {"_through_blocks": BETWEEN}


class Place(NamedTuple):
    """Where an operation belongs."""

    part: str
    backward: bool


def part_of(path: str) -> str:
    """The part that a path of modules belongs to; `ELSE` where none is named.

    Inside a block the block's own submodule decides, and elsewhere the innermost name that is known.
    """
    words = re.split(r"[/()]", path)
    for at, word in enumerate(words):
        if re.fullmatch(r"block_\d+|blocks", word):
            inner = words[at + 1] if at + 1 < len(words) else ""
            return f"{word} {inner if inner in OF_BLOCK else REST_OF_BLOCK}"
    last_words = [word.split(".")[-1] for word in words]
    return next((KNOWN[word] for word in reversed(last_words) if word in KNOWN), ELSE)


def place(path: str) -> Place:
    """The part, and whether the path is of the backward pass, which also computes again what was not saved."""
    return Place(part_of(path), "transpose(" in path or "rematted_computation" in path)


def in_order(found: Iterable[str]) -> list[str]:
    """The parts in the order in which a token meets them; those that are not in `found` are left out."""
    found = set(found)
    blocks = sorted({part.split()[0] for part in found if re.match(r"block(s|_\d+) ", part)}, key=_number)
    inner = [f"{block} {part}" for block in blocks for part in (*OF_BLOCK, REST_OF_BLOCK)]
    return [part for part in (*BEFORE, *inner, BETWEEN, *AFTER[:-1], BETWEEN_DEVICES, ELSE, IDLE) if part in found]


def _number(block: str) -> int:
    return int(block.removeprefix("block_")) if block != "blocks" else 0


def majority(places: Sequence[Place], own: Place) -> Place:
    """Where most of a fusion's operations belong; its own place where none is known or others are not more.

    Args:
      places: of its operations.
      own: by the fusion's own name.
    """
    known = [at for at in places if at.part != ELSE]
    most = max(known, key=known.count, default=own)
    return own if own.part != ELSE and known.count(own) == known.count(most) else most
