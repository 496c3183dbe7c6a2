"""Captures and changes the inputs and outputs of modules in a forward pass, by the path of the module.

A site is a module path, such as "block_0/attention", for the module's output, or the path followed by ".in" for its
input. Useful sites of a decoder or an encoder (those of an encoder-decoder begin with "encoder/" or "decoder/"):

    tokens                    the embedded tokens [B, T, D]
    block_0.in, block_0       the residual stream before and after a block [B, T, D]
    block_0/attention         the output of attention; block_0/mlp likewise
    block_0/attention/out.in  the concatenated heads [B, T, H * K]
    block_0/mlp/down.in       an MLP's neurons [B, T, F]
    logits                    [B, T, V]

Sites of a module that is called again, such as an encoder-decoder's token embedding, end in "#2", "#3", ...
Pure functions of (model, params, ids); under `jax.jit`, computation that a change makes redundant is removed.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import DataError
from gptjax.models.model import Interceptor, Model

Change = Callable[[jax.Array], jax.Array]

METHODS = ("__call__", "cross_attend")  # at most one of them is called per module
LOGITS = "logits"


class ForwardResult(NamedTuple):
    """Logits of a forward pass, and captured activations by site, in the order of computation."""

    logits_BTV: jax.Array
    activations: dict[str, jax.Array]


def forward(
    model: nn.Module,
    params: Any,
    ids_BT: Any,
    keep: str = "",
    changes: Mapping[str, Change | jax.Array] | None = None,
    **more: Any,
) -> ForwardResult:
    """Runs a forward pass without dropout, with unrolled blocks, that changes and captures sites (after changes).

    Args:
      model: from gptjax.models.build.
      params: of the model; layers may be stacked.
      ids_BT: token ids.
      keep: a regular expression that the full names of captured sites match; "" captures none.
      changes: by site, its new value, or a function of its value.
      **more: other inputs of the model, by name.

    Raises:
      DataError: the model has no such site to change, or none that matches `keep`.
    """
    model, params = models.unroll_layers(model, params)
    activations: dict[str, jax.Array] = {}
    named: list[str] = []
    calls: Counter[str] = Counter()
    changes, pattern = changes or {}, re.compile(keep)

    def visit(site: str, x: jax.Array) -> jax.Array:
        calls[site] += 1
        site = site if calls[site] == 1 else f"{site}#{calls[site]}"
        named.append(site)
        if site in changes:
            change: Any = changes[site]
            x = change(x) if callable(change) else jnp.broadcast_to(jnp.asarray(change, x.dtype), x.shape)
        if keep and pattern.fullmatch(site):
            activations[site] = x
        return x

    intercepted: Any = model.clone(attached=site_interceptor(visit, model.attached))  # type: ignore[attr-defined]
    logits_BTV = intercepted.apply({"params": params}, jnp.asarray(ids_BT), **more)
    missing = [site for site in changes if site not in named] + ([] if activations or not keep else [keep])
    if missing:
        near = difflib.get_close_matches(missing[0], named, n=3, cutoff=0)
        raise DataError(f"no site {missing[0]!r} in this model; similar ones are {', '.join(near)}")
    return ForwardResult(logits_BTV, activations)


def capture(model: nn.Module, params: Any, ids_BT: Any, keep: str, **more: Any) -> dict[str, jax.Array]:
    """Captures activations by site; arguments and errors are those of `forward`."""
    return forward(model, params, ids_BT, keep, **more).activations


def names(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> dict[str, tuple[int, ...]]:
    """All sites and their shapes, in the order of computation, by `jax.eval_shape`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(params: Any) -> None:
        activations = capture(model, params, ids_BT, ".*", **more)
        shapes.update({site: x.shape for site, x in activations.items()})

    jax.eval_shape(record, params)
    return shapes


def stream(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """The residual stream before the first block and after each, [L + 1, B, T, D], of a decoder or an encoder."""
    activations = capture(model, params, ids_BT, r"block_0\.in|block_\d+", **more)
    layers = len(activations) - 1
    return jnp.stack([activations["block_0.in"], *(activations[f"block_{i}"] for i in range(layers))])


def site_interceptor(visit: Callable[[str, jax.Array], jax.Array], inner: Interceptor | None) -> Interceptor:
    """An interceptor that replaces inputs and outputs of modules by `visit(site, array)`, around an inner one."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        def run(*args: Any) -> Any:
            return call(*args, **kwargs) if inner is None else inner(call, args, kwargs, context)

        site = site_of(context.module)
        if context.method_name not in METHODS or not site:
            return run(*args)
        if args and site != LOGITS:
            args = (map_first_array(args[0], lambda x: visit(f"{site}.in", x)), *args[1:])
        return map_first_array(run(*args), lambda x: visit(site, x))

    return intercept


def site_of(module: nn.Module) -> str:
    """The site of a module: its path, or "" for a module that shares the model's scope."""
    path = "/".join(module.path)
    return LOGITS if isinstance(module, Model) and not path else path


def map_first_array(value: Any, change: Change) -> Any:
    """Changes the first floating-point array of a module's input or output, such as x_BTD of a ResidualStream."""
    leaves, tree = jax.tree.flatten(value)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[number] = change(leaf)
            return jax.tree.unflatten(tree, leaves)
    return value
