"""Two layouts of one decoder's parameters: a folder per block, or all blocks stacked on a leading axis L.

`config.model.scan_layers` decides which a model reads; these turn one into the other, bit for bit.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """{"block_0": ..., "block_1": ..., rest} -> {"blocks": leaves [L, ...], rest}."""
    names = sorted((n for n in params if re.fullmatch(r"block_\d+", n)), key=lambda n: int(n.removeprefix("block_")))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {name: value for name, value in params.items() if name not in names} | {"blocks": stacked}


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The other way round."""
    layers = len(jax.tree.leaves(params["blocks"])[0])
    blocks = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(layers)}
    return {name: value for name, value in params.items() if name != "blocks"} | blocks
