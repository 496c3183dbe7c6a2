"""What a person hands to a model's forward pass, checked before anything is compiled."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import DataError


def check_inputs(model: nn.Module, given: Sequence[Any], by_name: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arguments of a model's `features`, by name.

    Args:
      model: as gptjax.models.build gives it.
      given: in order: ids_BT, then what `also_reads` of the model lists.
      by_name: others of these. An encoder-decoder's `source_segments_BS` may be left out: all ones.

    Raises:
      DataError: one that is missing, too many or unknown, not whole numbers, of another shape than it should have,
        longer than the context, or ids or types out of range.
    """
    names = ("ids_BT", *(name for name in model.also_reads if not name.startswith("perturbation")))  # type: ignore[attr-defined]
    kind = models.kind(model)
    if len(given) > len(names):
        raise DataError(f"{len(given)} arrays are more than models of kind {kind} read: {', '.join(names)}")
    found = dict(zip(names, given, strict=False))
    for name in by_name:
        if name in found or name not in names:
            raise DataError(
                f"{name} is given twice" if name in found else f"{name} is nothing that models of kind {kind} read"
            )
    found = {name: np.asarray(value) for name, value in (found | dict(by_name)).items() if value is not None}
    if kind == "seq2seq" and "source_BS" in found and "source_segments_BS" not in found:
        found["source_segments_BS"] = np.ones(found["source_BS"].shape, np.int32)
    needed = ("ids_BT", "source_BS") if kind == "seq2seq" else ("ids_BT",)
    for name in needed:
        if name not in found:
            raise DataError(f"models of kind {kind} need {name}; they read {', '.join(names)}")
    for name, array in found.items():
        _check(model, name, array, found)
    return found


def _check(model: nn.Module, name: str, array: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    config: Any = model.config  # type: ignore[attr-defined]
    what, axes = name.rsplit("_", 1)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        letters = ", ".join(axes)
        raise DataError(f"{what} must be whole numbers of shape [{letters}], not {array.dtype} of shape {array.shape}")
    like = "ids_BT" if axes == "BT" else "source_BS"
    if array.shape != found[like].shape:
        raise DataError(f"{name} has the shape {array.shape}, and {like} {found[like].shape}")
    if len(array) != len(found["ids_BT"]):
        raise DataError(f"{name} has {len(array)} rows, and ids_BT {len(found['ids_BT'])}")
    if array.shape[1] > config.context:
        raise DataError(f"{array.shape[1]} tokens are more than the model's context of {config.context}")
    ids = models.readable(model)
    limits = {"ids": ids, "source": ids, "types": max(config.types, 1), "ahead": 2}
    highest = limits.get(what, np.iinfo(np.int32).max) - 1
    if array.size and not (0 <= array.min() and array.max() <= highest):
        raise DataError(f"{what} must lie in 0 to {highest}")
