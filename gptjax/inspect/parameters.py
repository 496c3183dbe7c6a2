"""A tree of parameters as a table: shapes, counts and norms, as text and for a notebook (treescope)."""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path, shape, how many numbers it has and their root of summed squares."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    norm: float


def rows(params: Any) -> list[Row]:
    """One row a parameter, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return [_row("/".join(str(k.key) for k in path), np.asarray(leaf)) for path, leaf in leaves]


def _row(path: str, leaf: np.ndarray) -> Row:
    norm = float(np.linalg.norm(leaf.astype(np.float64)))
    return Row(path, leaf.shape, str(leaf.dtype), leaf.size, norm)


def as_text(params: Any) -> str:
    """The table in plain text, one line a parameter and a total."""
    table = rows(params)
    wide = max((len(row.path) for row in table), default=0)
    lines = [f"{'parameter':{wide}}  {'shape':>14}  {'count':>12}  {'norm':>9}"]
    for row in table:
        shape = " x ".join(map(str, row.shape))
        lines.append(f"{row.path:{wide}}  {shape:>14}  {row.count:>12,}  {row.norm:9.3f}")
    lines.append(f"{'total':{wide}}  {'':>14}  {sum(row.count for row in table):>12,}")
    return "\n".join(lines)


def as_html(params: Any) -> str:
    """The tree as treescope shows it: folders that open, each leaf with its row, and the arrays to look into."""
    import treescope

    def shown(node: Any, path: str = "") -> Any:
        if hasattr(node, "items"):
            inner = {name: shown(child, f"{path}/{name}") for name, child in node.items()}
            count = sum(leaf.size for leaf in jax.tree.leaves(node))
            return {f"{name} ({_size(node[name])})": child for name, child in inner.items()} if count else inner
        leaf = np.asarray(node)
        return {"shape": leaf.shape, "norm": round(_row(path, leaf).norm, 4), "values": leaf}

    return treescope.render_to_html(shown(params), roundtrip_mode=False)


def _size(node: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(node)):,}"
