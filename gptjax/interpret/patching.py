"""What of one text's computation makes the difference to another's: activations put from one pass into another.

Activation patching (causal tracing, arXiv 2202.05262 section 2.1) and path patching (arXiv 2304.05969;
arXiv 2211.00593 appendix B). Both texts have as many tokens. Pure functions of (model, params, ids).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.interpret import sites
from gptjax.interpret.ablation import columns, heads_site
from gptjax.interpret.lens import blocks
from gptjax.interpret.measures import Measure


def by_position(
    model: nn.Module, params: Any, ids_BT: Any, from_ids_BT: Any, where: Sequence[str], measure: Measure, **more: Any
) -> jax.Array:
    """The measure of a text with one site at one position as it is in another text, [sites, T, B].

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: the text that is patched, such as a corrupted one.
      from_ids_BT: the text that the activations come from.
      where: sites of arrays [B, T, ...], such as "block_0.in".
      measure: of the logits; see gptjax.interpret.measures.
      **more: what else the model reads, by name.
    """
    T = jnp.shape(ids_BT)[1]

    @jax.jit
    def measured(params: Any) -> jax.Array:
        other = sites.forward(model, params, from_ids_BT, "|".join(where), **more).kept

        def at_site(site: str) -> jax.Array:
            def patched(position: jax.Array) -> jax.Array:
                def change(x: jax.Array) -> jax.Array:
                    here = (jnp.arange(T) == position).reshape(1, T, *[1] * (x.ndim - 2))
                    return jnp.where(here, other[site], x)

                return measure(sites.forward(model, params, ids_BT, changes={site: change}, **more).logits_BTV)

            return jax.lax.map(patched, jnp.arange(T))

        return jnp.stack([at_site(site) for site in where])

    return measured(params)


def heads(model: nn.Module, params: Any, ids_BT: Any, from_ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure of a text with one head, at all positions, as it is in another text, [L, H, B].

    Arguments as of `by_position`.

    Raises:
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    L, H = blocks(model), model.config.heads  # type: ignore[attr-defined]

    @jax.jit
    def measured(params: Any) -> jax.Array:
        other = sites.forward(model, params, from_ids_BT, "|".join(map(heads_site, range(L))), **more).kept

        def patched(number: jax.Array) -> jax.Array:
            def change(layer: int) -> sites.Change:
                own = columns(model, number % H) * (number // H == layer)
                return lambda x: jnp.where(own > 0, other[heads_site(layer)], x)

            changes = {heads_site(layer): change(layer) for layer in range(L)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        return jax.lax.map(patched, jnp.arange(L * H)).reshape(L, H, -1)

    return measured(params)


def along_path(
    model: nn.Module,
    params: Any,
    ids_BT: Any,
    from_ids_BT: Any,
    sender: tuple[int, int] | str,
    receivers: Sequence[str],
    **more: Any,
) -> jax.Array:
    """Logits_BTV of a text in which receivers read what one sender writes in another text; all else stays as it was.

    All sublayers but the sender's give what they gave, so that what the sender writes reaches the receivers through the
    residual stream alone, and through no sublayer between. After the receivers everything is computed.

    Args:
      model: a decoder or an encoder.
      params: of the model.
      ids_BT: the text.
      from_ids_BT: the text that the sender reads.
      sender: a head, by layer and number, or a sublayer, such as "block_0/mlp".
      receivers: sites that are read, such as "block_1/attention/qkv.in", or "final_norm.in".
      **more: what else the model reads, by name.

    Raises:
      DataError: a receiver that does not exist.
      ConfigError: neither a decoder nor an encoder made of blocks.
    """
    L = blocks(model)
    name = sender if isinstance(sender, str) else heads_site(sender[0])
    sublayers = [f"block_{i}/{part}" for i in range(L) for part in ("attention", "mlp")]

    @jax.jit
    def patched(params: Any) -> jax.Array:
        sent = sites.forward(model, params, from_ids_BT, name, **more).kept[name]
        was = sites.forward(model, params, ids_BT, "|".join(sublayers), **more).kept

        def send(x: jax.Array) -> jax.Array:
            return sent if isinstance(sender, str) else jnp.where(columns(model, sender[1]) > 0, sent, x)

        frozen = {site: x for site, x in was.items() if not name.startswith(site)}
        heard = sites.forward(model, params, ids_BT, "|".join(receivers), frozen | {name: send}, **more).kept
        told = {site: heard.get(site, jnp.zeros(())) for site in receivers}  # one that is nowhere is refused there
        return sites.forward(model, params, ids_BT, changes=told, **more).logits_BTV

    return patched(params)


def recovered(patched: jax.Array, corrupted: jax.Array, clean: jax.Array) -> jax.Array:
    """Which part of the way from the corrupted text's measure to the clean one's a patch goes: 0 none, 1 all."""
    return (patched - corrupted) / (clean - corrupted)
