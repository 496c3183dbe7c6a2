"""Muon (Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024)."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import contrib

from gptjax.config.options import option
from gptjax.optim.adamw import adamw
from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale, path_names


@dataclass(frozen=True)
class MuonOptions:
    """AdamW trains all parameters but hidden matrices."""

    momentum: float = option(0.95, "decay of the momentum of hidden matrices, per step", below=1, traced=True)
    adam_learning_rate: float | None = option(
        None, "peak learning rate of the other parameters; None: same as optimizer.learning_rate", traced=True
    )


def muon(context: Context) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW on all others.

    A matrix's update is its momentum with all singular values set to about 1 (five Newton-Schulz steps), times
    0.2 sqrt(max(rows, columns)): its root mean square is then near AdamW's (arXiv 2502.16982, eq. 4), so that one
    learning rate serves both. Stacked layers and experts are batches of matrices. Queries, keys and values that share
    a kernel are one matrix.
    """
    by_matrix = contrib.scale_by_muon(beta=context.own.momentum, weight_dimension_numbers=muon_dimension_numbers)
    # Not contrib.muon: its AdamW part would be NAdam, and would decay either norms and biases too, or nothing.
    parts = {
        "muon": optax.chain(by_matrix, optax.stateless(match_adam_rms), *decay_and_scale(context, orthogonal=True)),
        "adamw": adamw(context, context.schedule(context.own.adam_learning_rate)),
    }
    return optax.partition(
        parts,
        lambda params: jax.tree.map(lambda is_hidden: "muon" if is_hidden else "adamw", hidden_matrix_mask(params)),
    )


def hidden_matrix_mask(params: Any) -> Any:
    """Returns a tree of booleans: True for each matrix but the head's: those between hidden features."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: path_names(path)[-1] == "kernel" and "head" not in path_names(path), params
    )


def muon_dimension_numbers(updates: Any) -> Any:
    """Returns Muon's dimension numbers: the last two axes are rows and columns, those before are batch axes."""
    return jax.tree.map(lambda u: contrib.MuonDimensionNumbers(u.ndim - 2, u.ndim - 1), updates)


def match_adam_rms(updates: Any, params: Any) -> Any:
    """Scales orthogonal matrices to a root mean square of 0.2, near that of AdamW's updates (arXiv 2502.16982, 2.2)."""
    return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[-2:])) * u, updates)


MUON = Optimizer(muon, MuonOptions, moments=1)
