"""Which tokens a measure owes to what: gradients with respect to what a site gives, of one pass or along a path.

Pure functions of (model, params, ids); a site's array is [B, T, D], "tokens" unless told otherwise. Values are per text
and position; the sum over D is what most pictures show.
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
    """d measure / dx * x at a site, [B, T, D] (arXiv 1605.01713).

    Raises:
      DataError: no such site.
    """

    @jax.jit
    def attributed(params: Any) -> jax.Array:
        x_BTD = sites.capture(model, params, ids_BT, site, **more)[site]
        return x_BTD * jax.grad(lambda x: _measured(model, params, ids_BT, measure, site, x, more).sum())(x_BTD)

    return attributed(params)


def integrated(
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

    They add up to the measure less that of the baseline (proposition 1), as exactly as the steps are many.

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: token ids.
      measure: of the logits; see gptjax.interpret.measures.
      site: where the path begins and ends.
      baseline: where it begins: an array [B, T, D], or what broadcasts to it; best not a vector of equal numbers,
        whose layer norm is a jump.
      steps: points on the way.
      **more: what else the model reads, by name.

    Raises:
      DataError: no such site.
    """

    @jax.jit
    def attributed(params: Any) -> jax.Array:
        x_BTD = sites.capture(model, params, ids_BT, site, **more)[site]
        way_BTD = x_BTD - baseline

        def add(total_BTD: jax.Array, share: jax.Array) -> tuple[jax.Array, None]:
            at = baseline + share * way_BTD
            slope = jax.grad(lambda x: _measured(model, params, ids_BT, measure, site, x, more).sum())(at)
            return total_BTD + slope / steps, None

        shares = (jnp.arange(steps) + 0.5) / steps
        return way_BTD * jax.lax.scan(add, jnp.zeros_like(x_BTD), shares)[0]

    return attributed(params)


def _measured(
    model: nn.Module, params: Any, ids_BT: Any, measure: Measure, site: str, x: jax.Array, more: Any
) -> jax.Array:
    return measure(sites.forward(model, params, ids_BT, changes={site: x}, **more).logits_BTV)
