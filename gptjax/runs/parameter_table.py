"""Tables of parameters: shapes, counts and norms, as text and for notebooks, and pictures of shardings (treescope)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One parameter, or a subtree: its number of elements and their Euclidean norm."""

    depth: int
    path: tuple[str, ...]
    node: Any  # the array, or the mapping of the subtree
    size: int
    norm: float

    @property
    def shape(self) -> str:
        """ "128 x 384" for an array, "one" for a scalar, "" for a subtree."""
        return "" if isinstance(self.node, Mapping) else " x ".join(map(str, self.node.shape)) or "one"


def rows(node: Any, path: tuple[str, ...] = ()) -> Iterator[Row]:
    """Yields a row per subtree, the root first, each followed by the rows of its children."""
    if not isinstance(node, Mapping):
        leaf = np.asarray(node)
        yield Row(len(path), path, leaf, leaf.size, float(np.linalg.norm(leaf.astype(np.float64))))
        return
    below = [list(rows(child, (*path, name))) for name, child in node.items()]
    children = [of_child[0] for of_child in below]
    norm = math.sqrt(sum(row.norm**2 for row in children))
    yield Row(len(path), path, node, sum(row.size for row in children), norm)
    for of_child in below:
        yield from of_child


def as_text(params: Any) -> str:
    """Formats the table as plain text: one line per parameter, and a total."""
    total, *inner = rows(params)
    leaves = [row for row in inner if row.shape]
    wide = max((len("/".join(row.path)) for row in leaves), default=0)
    lines = [f"{'parameter':{wide}}  {'shape':>14}  {'count':>12}  {'norm':>9}"]
    for row in [*leaves, total._replace(path=("total",))]:
        lines.append(f"{'/'.join(row.path):{wide}}  {row.shape:>14}  {row.size:>12,}  {row.norm:9.3f}")
    return "\n".join(lines)


class Table:
    """The table for treescope: subtrees that fold, and an array behind each row."""

    def __init__(self, params: Any, title: str) -> None:
        self.params, self.title = params, title

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts as parts

        by_path = {row.path: row for row in rows(self.params)}
        wide = max(2 * row.depth + len(row.path[-1]) for row in by_path.values() if row.path)
        wide = max(wide, len(self.title))

        def shown(at: tuple[str, ...]) -> Any:
            row = by_path[at]
            name = at[-1] if at else self.title
            label = f"{name:{wide - 2 * row.depth}}  {row.shape:>14}  {row.size:>12,}  {row.norm:10.3f}"
            folder = isinstance(row.node, Mapping)
            inside = [shown((*at, child)) for child in row.node] if folder else [subtree_renderer(row.node)]
            return parts.build_custom_foldable_tree_node(
                label=parts.text(label),
                contents=parts.fold_condition(expanded=parts.indented_children(inside)),
                path=None,
                expand_state=parts.ExpandState.EXPANDED if folder else parts.ExpandState.COLLAPSED,
            ).renderable

        heading = parts.comment_color(parts.text(f"  {'':{wide}}  {'shape':>14}  {'count':>12}  {'norm':>10}"))
        return parts.on_separate_lines([heading, shown(())])


def as_html(params: Any, title: str) -> str:
    """Renders the table as HTML for a notebook."""
    import treescope

    return treescope.render_to_html(Table(params, title))


def sharding_html(array: Any) -> str:
    """Renders the sharding of a JAX array over devices as HTML for a notebook."""
    import treescope

    return str(treescope.render_array_sharding(array)._repr_html_())
