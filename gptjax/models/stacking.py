"""Two layouts of a model's parameters: a folder per block, or all blocks stacked along a leading axis L.

`config.model.scan_layers` selects the layout; these functions convert one into the other, bit for bit.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """Stacks blocks: {"block_0": ..., "block_1": ..., rest} -> {"blocks": leaves [L, ...], rest}, at any depth."""
    names = sorted((n for n in params if re.fullmatch(r"block_\d+", n)), key=lambda n: int(n.removeprefix("block_")))
    rest = {n: stack(value) if isinstance(value, dict) else value for n, value in params.items() if n not in names}
    if not names:
        return rest
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `stack`."""
    rest = {n: unstack(value) if isinstance(value, dict) else value for n, value in params.items() if n != "blocks"}
    if "blocks" not in params:
        return rest
    layers = len(jax.tree.leaves(params["blocks"])[0])
    return rest | {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(layers)}
