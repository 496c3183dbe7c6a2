"""Locates the first non-finite number: in a parameter, a module of the forward pass, the loss, or a gradient.

The forward pass runs unrolled and without rematerialization, whatever the run's config says, so that each module can be
checked; scanned layers are named by their number.
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
    """The first non-finite number and its place.

    Attributes:
      what: "parameter", "activation", "loss" (of finite activations), "gradient" (of a finite loss), "nothing", or
        "not known".
      where: a parameter's path, or a module's, such as "block_3/mlp/down".
    """

    what: str
    where: str = ""

    def __str__(self) -> str:
        sentences = {
            "parameter": f"the parameter {self.where} is not finite",
            "activation": f"the first activation that is not finite is {self.where}",
            "loss": "all activations are finite, the loss is not",
            "gradient": f"the loss is finite; the first non-finite gradient in backward order is that of {self.where}",
            "nothing": "parameters, activations and gradients are finite",
        }
        return sentences.get(self.what, f"where is not known ({self.where})")


def find_first(
    config: ConfigDict, params: Any, batch: Any, rng: jax.Array | None, gradient: Callable[[Any, Any], Any]
) -> Finding:
    """Finds the first non-finite number, in the order of computation.

    Args:
      config: of the run.
      params: of its model.
      batch: of the objective.
      rng: the key of dropout; None: no dropout.
      gradient: `(params, batch) -> gradient of the loss`, as the train step computes it; called only if parameters and
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
        return order.index(module) if module in order else len(order)  # the module of a head is read, not called

    return Finding("gradient", max(bad, key=last_use))


def finite_by_path(tree: Any) -> dict[str, bool]:
    """Returns, by path, True if all numbers of a leaf are finite; stacked blocks are separate."""

    def by_block(tree: Any) -> Any:
        return unstack(tree) if "blocks" in tree else tree

    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), by_block(tree)))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(finite))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf) for path, leaf in leaves}


def check_forward(config: ConfigDict, params: Any, batch: Any, rng: jax.Array | None) -> list[tuple[str, bool]]:
    """Runs the forward pass and checks the inputs and outputs of each module.

    Returns:
      (name, is finite) in the order of computation: "the input of block_0/mlp", "block_0/mlp", and last "loss".
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

        def check(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, name = context.module, "/".join(context.module.path)
            # Dropout of attention weights happens inside a kernel and cannot be checked.
            if context.method_name != "__call__" or isinstance(module, nn.Dropout):
                return call(*args, **kwargs)
            note(f"the input of {name}", args)
            output = call(*args, **kwargs)
            note(name, output)
            return output

        with nn.intercept_methods(check):
            loss, _ = objective(params if "blocks" not in params else unstack(params), batch, rng)
        note("loss", loss)
        return finite

    finite = jax.device_get(jax.jit(run)(params, batch))
    return [(name, bool(flag)) for name, flag in zip(names, finite, strict=True)]


def unrolled_model(config: ConfigDict) -> nn.Module:
    """The model of a run with its blocks unrolled."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(scan_layers=False, remat="none")
    return methods.build_model(config)
