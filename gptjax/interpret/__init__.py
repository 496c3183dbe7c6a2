"""Interpretability: pure functions of a model, its parameters and token ids.

In a notebook, `from gptjax import interpret` gives every module of this package, imported on first use:
`interpret.lens.logit_lens(run.model, run.params, ids)`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports a module of this package on first use."""
    from importlib import import_module, util

    if name.startswith("_") or util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
