"""Where numbers stop being finite: a parameter, a module of the forward pass, the loss, or a gradient. Changes nothing.

The forward pass is run block by block without rematerialisation, whatever the run's own is, so that each module can
be looked at; layers that a scan stacks are named by their number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import objectives
from gptjax.finetune import methods
from gptjax.models.stacking import unstack


class Finding(NamedTuple):
    """What is not finite, and where it is.

    Attributes:
      what: "parameter", "activation", "loss" (of finite activations), "gradient" (of a finite loss), "nothing", or
        "not known".
      where: a parameter's path, or a module's, such as "block_3/mlp/down".
    """

    what: str
    where: str = ""

    def __str__(self) -> str:
        told = {
            "parameter": f"the parameter {self.where} is not finite",
            "activation": f"the first activation that is not finite is {self.where}",
            "loss": "all activations are finite, the loss is not",
            "gradient": f"the loss is finite; the first gradient on the way back that is not is that of {self.where}",
            "nothing": "parameters, activations and gradients are finite",
        }
        return told.get(self.what, f"where is not known ({self.where})")


def find_first(
    config: ConfigDict, params: Any, batch: Any, rng: jax.Array | None, gradient: Callable[[Any, Any], Any]
) -> Finding:
    """The first thing that is not finite, in the order of computation.

    Args:
      config: of the run.
      params: of its model.
      batch: as its objective takes it.
      rng: the key of dropout, or None for none.
      gradient: `(params, batch) -> the loss's gradient`, as the train step computes it; asked only where parameters and
        forward pass are finite.
    """
    bad = [name for name, finite in finite_by_path(params).items() if not finite]
    if bad:
        return Finding("parameter", bad[0])
    events = check_forward(config, params, batch, rng)
    bad = [name for name, finite in events if not finite]
    if bad:
        return Finding("loss") if bad[0] == "loss" else Finding("activation", bad[0])
    bad = [name for name, finite in finite_by_path(jax.jit(gradient)(params, batch)).items() if not finite]
    if not bad:
        return Finding("nothing")
    order = [name for name, _ in events]

    def last_use(name: str) -> int:
        module = name.rpartition("/")[0]
        return order.index(module) if module in order else len(order)  # a head's module is only read

    return Finding("gradient", max(bad, key=last_use))


def finite_by_path(tree: Any) -> dict[str, bool]:
    """Whether all numbers of a leaf are finite, by path; blocks that are stacked one by one."""

    def by_block(tree: Any) -> Any:
        return unstack(tree) if "blocks" in tree else tree

    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), by_block(tree)))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf) for path, leaf in leaves}


def check_forward(config: ConfigDict, params: Any, batch: Any, rng: jax.Array | None) -> list[tuple[str, bool]]:
    """What each module reads ("the input of block_0/mlp") and gives ("block_0/mlp"), in the order of computation, and
    last the "loss": with whether it is finite.
    """
    names: list[str] = []
    objective = objectives.loss(config, unrolled_model(config))

    def run(params: Any, batch: Any) -> list[jax.Array]:
        finite: list[jax.Array] = []
        names.clear()

        def note(name: str, values: Any) -> None:
            arrays = [x for x in jax.tree.leaves(values) if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)]
            names.append(name)
            finite.append(jnp.stack([jnp.isfinite(x).all() for x in arrays]).all() if arrays else jnp.array(True))

        def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, name = context.module, "/".join(context.module.path)
            # Dropout of attention weights is drawn inside a kernel, whose numbers do not leave it.
            if context.method_name != "__call__" or isinstance(module, nn.Dropout):
                return call(*args, **kwargs)
            note(f"the input of {name}", args)
            given = call(*args, **kwargs)
            note(name, given)
            return given

        with nn.intercept_methods(look):
            loss, _ = objective(params if "blocks" not in params else unstack(params), batch, rng)
        note("loss", loss)
        return finite

    finite = jax.device_get(jax.jit(run)(params, batch))
    return [(name, bool(flag)) for name, flag in zip(names, finite, strict=True)]


def unrolled_model(config: ConfigDict) -> nn.Module:
    """The run's model with its blocks one by one."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(scan_layers=False, remat="none")
    return methods.model_of(config)
