"""Looking into a model: what it computes for given tokens, what its parameters are, and what a train step costs.

In a notebook, `from gptjax import inspect` has all modules here: `inspect.lens.logit_lens(run.model, run.params, ids)`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """A module of this package, imported when it is asked for."""
    from importlib import import_module, util

    if name.startswith("_") or util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
