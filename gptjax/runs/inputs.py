"""Checks inputs of a model's forward pass before anything is compiled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import DataError


def check_inputs(model: nn.Module, positional: Sequence[Any], by_name: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arguments of a model's `features`, by name.

    Args:
      model: from gptjax.models.build.
      positional: in order: ids_BT, then the inputs that `extra_inputs` of the model lists.
      by_name: further inputs. `source_segments_BS` of an encoder-decoder defaults to all ones.

    Raises:
      DataError: an array that is missing, superfluous or unknown, not of integers, of a wrong shape, longer than the
        context, or with ids or types out of range.
    """
    names = ("ids_BT", *(name for name in model.extra_inputs if not name.startswith("perturbation")))  # type: ignore[attr-defined]
    kind = models.kind(model)
    if len(positional) > len(names):
        raise DataError(f"{len(positional)} arrays are more than models of kind {kind} read: {', '.join(names)}")
    values = dict(zip(names, positional, strict=False))
    for name in by_name:
        if name in values or name not in names:
            raise DataError(
                f"{name} is given twice" if name in values else f"{name} is no input of models of kind {kind}"
            )
    arrays = {name: np.asarray(value) for name, value in (values | dict(by_name)).items() if value is not None}
    if kind == "seq2seq" and "source_BS" in arrays and "source_segments_BS" not in arrays:
        arrays["source_segments_BS"] = np.ones(arrays["source_BS"].shape, np.int32)
    needed = ("ids_BT", "source_BS") if kind == "seq2seq" else ("ids_BT",)
    for name in needed:
        if name not in arrays:
            raise DataError(f"models of kind {kind} need {name}; they read {', '.join(names)}")
    for name, array in arrays.items():
        _check(model, name, array, arrays)
    return arrays


def _check(model: nn.Module, name: str, array: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    config: Any = model.config  # type: ignore[attr-defined]
    kind, axes = name.rsplit("_", 1)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        letters = ", ".join(axes)
        raise DataError(f"{kind} must be whole numbers of shape [{letters}], not {array.dtype} of shape {array.shape}")
    reference = "ids_BT" if axes == "BT" else "source_BS"
    if array.shape != arrays[reference].shape:
        raise DataError(f"{name} has the shape {array.shape}, and {reference} {arrays[reference].shape}")
    if len(array) != len(arrays["ids_BT"]):
        raise DataError(f"{name} has {len(array)} rows, and ids_BT {len(arrays['ids_BT'])}")
    if array.shape[1] > config.context:
        raise DataError(f"{array.shape[1]} tokens are more than the model's context of {config.context}")
    ids = models.num_embeddings(model)
    limits = {"ids": ids, "source": ids, "types": max(config.types, 1), "bidirectional": 2}
    highest = limits.get(kind, np.iinfo(np.int32).max) - 1
    if array.size and not (0 <= array.min() and array.max() <= highest):
        raise DataError(f"{kind} must lie in 0 to {highest}")
