"""The one way into a forward pass: what each module reads and gives, by the module's path, to be kept or changed.

A site is a path of modules, such as "block_0/attention", for what the module gives, and the same with ".in" behind it
for what it reads. Of use are, in a decoder or an encoder (an encoder-decoder has "encoder/" or "decoder/" before them):

    tokens                    the embedded tokens [B, T, D]
    block_0.in, block_0       the residual stream before and after a block [B, T, D]
    block_0/attention         what attention adds to it; block_0/mlp likewise
    block_0/attention/out.in  what the heads read, side by side [B, T, H * K]
    block_0/mlp/down.in       an MLP's neurons [B, T, F]
    logits                    [B, T, V]

Where a module is called again, as an encoder-decoder's table of tokens is, its sites end in "#2", "#3", ...
Pure functions of (model, params, ids); under `jax.jit`, what a change makes superfluous is not computed.
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

METHODS = ("__call__", "cross_attend")  # each module has at most one of them that is called
LOGITS = "logits"


class Seen(NamedTuple):
    """What a forward pass gave, and what was kept of it by site, in the order of computation."""

    logits_BTV: jax.Array
    kept: dict[str, jax.Array]


def forward(
    model: nn.Module,
    params: Any,
    ids_BT: Any,
    keep: str = "",
    changes: Mapping[str, Change | jax.Array] | None = None,
    **more: Any,
) -> Seen:
    """A forward pass without dropout, blocks one by one, in which sites are changed and kept; kept as changed.

    Args:
      model: as gptjax.models.build gives it.
      params: of the model; layers may be stacked.
      ids_BT: token ids.
      keep: a regular expression that a site's whole name matches, or the name; nothing for none.
      changes: by site's name what it is to be instead, or a function of what it is.
      **more: what else the model reads, by name.

    Raises:
      DataError: a changed site, or one to keep, that is nowhere in the model.
    """
    model, params = models.unroll_layers(model, params)
    kept: dict[str, jax.Array] = {}
    named: list[str] = []
    calls: Counter[str] = Counter()
    changes, pattern = changes or {}, re.compile(keep)

    def at(site: str, x: jax.Array) -> jax.Array:
        calls[site] += 1
        site = site if calls[site] == 1 else f"{site}#{calls[site]}"
        named.append(site)
        if site in changes:
            change: Any = changes[site]
            x = change(x) if callable(change) else jnp.broadcast_to(jnp.asarray(change, x.dtype), x.shape)
        if keep and pattern.fullmatch(site):
            kept[site] = x
        return x

    watched: Any = model.clone(attached=watching(at, model.attached))  # type: ignore[attr-defined]
    logits_BTV = watched.apply({"params": params}, jnp.asarray(ids_BT), **more)
    missing = [site for site in changes if site not in named] + ([] if kept or not keep else [keep])
    if missing:
        near = difflib.get_close_matches(missing[0], named, n=3, cutoff=0)
        raise DataError(f"no site {missing[0]!r} in this model; near it are {', '.join(near)}")
    return Seen(logits_BTV, kept)


def capture(model: nn.Module, params: Any, ids_BT: Any, keep: str, **more: Any) -> dict[str, jax.Array]:
    """Intermediates by site; arguments and errors as of `forward`."""
    return forward(model, params, ids_BT, keep, **more).kept


def names(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> dict[str, tuple[int, ...]]:
    """All sites and their shapes, in the order of computation; nothing is computed."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(params: Any) -> None:
        kept = capture(model, params, ids_BT, ".*", **more)
        shapes.update({site: x.shape for site, x in kept.items()})

    jax.eval_shape(note, params)
    return shapes


def stream(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> jax.Array:
    """The residual stream before the first block and after each, [L + 1, B, T, D], of a decoder or an encoder."""
    kept = capture(model, params, ids_BT, r"block_0\.in|block_\d+", **more)
    layers = len(kept) - 1
    return jnp.stack([kept["block_0.in"], *(kept[f"block_{i}"] for i in range(layers))])


def watching(at: Callable[[str, jax.Array], jax.Array], within: Interceptor | None) -> Interceptor:
    """An interceptor that asks `at(site, array)` for what each module is to read and to give, around another one."""

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        def run(*args: Any) -> Any:
            return call(*args, **kwargs) if within is None else within(call, args, kwargs, context)

        site = site_of(context.module)
        if context.method_name not in METHODS or not site:
            return run(*args)
        if args and site != LOGITS:
            args = (with_first(args[0], lambda x: at(f"{site}.in", x)), *args[1:])
        return with_first(run(*args), lambda x: at(site, x))

    return look


def site_of(module: nn.Module) -> str:
    """Its path; nothing of a module that has its owner's."""
    path = "/".join(module.path)
    return LOGITS if isinstance(module, Model) and not path else path


def with_first(given: Any, change: Change) -> Any:
    """What a module reads or gives, with the first array of floats in it changed: of a Stream, x_BTD."""
    leaves, tree = jax.tree.flatten(given)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[number] = change(leaf)
            return jax.tree.unflatten(tree, leaves)
    return given
