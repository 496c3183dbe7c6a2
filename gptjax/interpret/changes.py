"""How far parameters move between two checkpoints of a run. Runs no model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.core.console import aligned
from gptjax.models.stacking import unstack
from gptjax.runs import checkpoint_dir


class Move(NamedTuple):
    """What became of one parameter; norms are the roots of sums of squares."""

    before: float  # its norm
    distance: float  # the difference's norm
    cosine: float  # between before and after; 0 where one of them is zero

    @property
    def ratio(self) -> float:
        """The distance as a share of the norm before; infinite where that was zero."""
        return self.distance / self.before if self.before else np.inf


def steps(workdir: str | Path) -> list[int]:
    """Steps of a run's checkpoints, the first one first: what gptjax.load takes as `step`."""
    return checkpoint_dir.steps(Path(workdir) / "checkpoints")[::-1]


def moves(before: Any, after: Any) -> dict[str, Move]:
    """How far each parameter moved, by path, layers one by one.

    Args:
      before: a tree of parameters.
      after: one of the same shapes.
    """
    found = {}
    later = jax.tree.leaves(unstack(after))
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(unstack(before)), later, strict=True):
        old, new = (np.asarray(x, np.float64).ravel() for x in (leaf, other))
        both = float(np.linalg.norm(old) * np.linalg.norm(new))
        cosine = float(old @ new) / both if both else 0.0
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = Move(float(np.linalg.norm(old)), float(np.linalg.norm(new - old)), cosine)
    return found


def rows_moved(before_VD: Any, after_VD: Any) -> np.ndarray:
    """How far each row moved as a share of its norm before, [V]: of a table of embeddings, each token's vector."""
    old, new = (np.asarray(x, np.float64) for x in (before_VD, after_VD))
    return np.asarray(np.linalg.norm(new - old, axis=1) / np.maximum(np.linalg.norm(old, axis=1), 1e-12))


def as_text(moved: Mapping[str, Move]) -> str:
    """A line for each parameter."""
    rows = [["parameter", "norm before", "moved by", "share", "cosine"]]
    rows += [
        [name, f"{own.before:.3f}", f"{own.distance:.3f}", f"{own.ratio:.4f}", f"{own.cosine:.4f}"]
        for name, own in moved.items()
    ]
    return "\n".join(aligned(rows))
