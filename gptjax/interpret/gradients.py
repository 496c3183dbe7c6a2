"""Gradient attribution of a measure to a site: gradient times input, and integrated gradients.

Pure functions of (model, params, ids). The site's array is [B, T, D], by default that of "tokens"; figures usually show
the sum over D.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.interpret import sites
from gptjax.interpret.measures import Measure


def gradient_times_input(
    model: nn.Module, params: Any, ids_BT: Any, measure: Measure, site: str = "tokens", **more: Any
) -> jax.Array:
    """Gradient of the measure times the activation at a site, [B, T, D] (arXiv 1605.01713).

    Raises:
      DataError: the model has no such site.
    """

    @jax.jit
    def attributed(params: Any) -> jax.Array:
        x_BTD = sites.capture(model, params, ids_BT, site, **more)[site]
        return x_BTD * jax.grad(lambda x: _measured(model, params, ids_BT, measure, site, x, more).sum())(x_BTD)

    return attributed(params)


def integrated_gradients(
    model: nn.Module,
    params: Any,
    ids_BT: Any,
    measure: Measure,
    site: str = "tokens",
    baseline: Any = 0.0,
    steps: int = 64,
    **more: Any,
) -> jax.Array:
    """Integrated gradients at a site, [B, T, D] (arXiv 1703.01365 eq. 1), by the midpoint rule.

    Their sum approximates the measure minus that of the baseline (proposition 1), more closely with more steps.

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: token ids.
      measure: of the logits; see gptjax.interpret.measures.
      site: the site of the path.
      baseline: the start of the path, an array that broadcasts to [B, T, D]; avoid vectors of equal values, at which
        layer norm is discontinuous.
      steps: points along the path.
      **more: other inputs of the model, by name.

    Raises:
      DataError: the model has no such site.
    """

    @jax.jit
    def attributed(params: Any) -> jax.Array:
        x_BTD = sites.capture(model, params, ids_BT, site, **more)[site]
        path_BTD = x_BTD - baseline

        def add(total_BTD: jax.Array, share: jax.Array) -> tuple[jax.Array, None]:
            x = baseline + share * path_BTD
            gradient = jax.grad(lambda x: _measured(model, params, ids_BT, measure, site, x, more).sum())(x)
            return total_BTD + gradient / steps, None

        shares = (jnp.arange(steps) + 0.5) / steps
        return path_BTD * jax.lax.scan(add, jnp.zeros_like(x_BTD), shares)[0]

    return attributed(params)


def _measured(
    model: nn.Module, params: Any, ids_BT: Any, measure: Measure, site: str, x: jax.Array, more: Any
) -> jax.Array:
    return measure(sites.forward(model, params, ids_BT, changes={site: x}, **more).logits_BTV)
