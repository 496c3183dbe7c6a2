"""Changes of parameters between two checkpoints of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.core.console import aligned
from gptjax.models.stacking import unstack
from gptjax.runs import checkpoint_dir


class ParameterChange(NamedTuple):
    """Change of one parameter, in Frobenius norms."""

    before: float  # norm before
    distance: float  # norm of the difference
    cosine: float  # between before and after; 0 if one of them is zero

    @property
    def ratio(self) -> float:
        """The distance divided by the norm before; infinite if that is zero."""
        return self.distance / self.before if self.before else np.inf


def steps(workdir: str | Path) -> list[int]:
    """Steps of a run's checkpoints in ascending order, for the argument `step` of gptjax.load."""
    return checkpoint_dir.steps(Path(workdir) / "checkpoints")[::-1]


def parameter_changes(before: Any, after: Any) -> dict[str, ParameterChange]:
    """Computes the change of each parameter, by path, with unstacked layers.

    Args:
      before: a tree of parameters.
      after: one of the same shapes.
    """
    result = {}
    later = jax.tree.leaves(unstack(after))
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(unstack(before)), later, strict=True):
        old, new = (np.asarray(x, np.float64).ravel() for x in (leaf, other))
        both = float(np.linalg.norm(old) * np.linalg.norm(new))
        cosine = float(old @ new) / both if both else 0.0
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        result[name] = ParameterChange(float(np.linalg.norm(old)), float(np.linalg.norm(new - old)), cosine)
    return result


def row_changes(before_VD: Any, after_VD: Any) -> np.ndarray:
    """Norm of the change of each row divided by its norm before, [V], such as of each token's embedding."""
    old, new = (np.asarray(x, np.float64) for x in (before_VD, after_VD))
    return np.asarray(np.linalg.norm(new - old, axis=1) / np.maximum(np.linalg.norm(old, axis=1), 1e-12))


def as_text(changes: Mapping[str, ParameterChange]) -> str:
    """Formats changes as a table with one line per parameter."""
    rows = [["parameter", "norm before", "moved by", "share", "cosine"]]
    rows += [
        [name, f"{change.before:.3f}", f"{change.distance:.3f}", f"{change.ratio:.4f}", f"{change.cosine:.4f}"]
        for name, change in changes.items()
    ]
    return "\n".join(aligned(rows))
