"""Adafactor (arXiv 1804.04235)."""

from typing import Any

import jax
import optax

from gptjax.optim.optimizer import Context, Optimizer, decay_and_scale, path_names


def adafactor(context: Context) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5): second moments factored into means of rows and of columns.

    The learning rate is relative: a step is about that times the root mean square of the parameter. The decay of the
    second moments is 1 - t^-0.8 and the epsilons are 1e-30 and 1e-3, as in section 9. Matrices with a side below 128
    are not factored.
    """
    # Not optax.adafactor: its decay would not follow the learning rate.
    by_leaf = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return optax.chain(per_layer(by_leaf), *decay_and_scale(context))


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner`, which depends on a leaf's shape, to each layer of leaves that `scan_layers` stacks."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: "stacked" if "blocks" in path_names(path) else "single", params
        )

    def init(params: Any) -> Any:
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.vmap(inner.update)(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

    return optax.partition({"stacked": optax.GradientTransformation(init, update), "single": inner}, labels)


ADAFACTOR = Optimizer(adafactor, scales_with_width=False)
