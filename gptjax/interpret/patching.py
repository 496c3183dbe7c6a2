"""Activation patching (causal tracing, arXiv 2202.05262 section 2.1) and path patching (arXiv 2304.05969;
arXiv 2211.00593 appendix B): activations of one text replace those of another text of equal length.

Pure functions of (model, params, ids).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.interpret import sites
from gptjax.interpret.ablation import head_mask, heads_site
from gptjax.interpret.lens import num_blocks
from gptjax.interpret.measures import Measure


def by_position(
    model: nn.Module, params: Any, ids_BT: Any, from_ids_BT: Any, where: Sequence[str], measure: Measure, **more: Any
) -> jax.Array:
    """The measure of a text with one site at one position patched from another text, [sites, T, B].

    Args:
      model: as gptjax.models.build gives it.
      params: of the model.
      ids_BT: the text to patch, such as a corrupted one.
      from_ids_BT: the text whose activations are patched in.
      where: sites of arrays [B, T, ...], such as "block_0.in".
      measure: of the logits; see gptjax.interpret.measures.
      **more: other inputs of the model, by name.
    """
    T = jnp.shape(ids_BT)[1]

    @jax.jit
    def measured(params: Any) -> jax.Array:
        other = sites.forward(model, params, from_ids_BT, "|".join(where), **more).activations

        def at_site(site: str) -> jax.Array:
            def patched(position: jax.Array) -> jax.Array:
                def change(x: jax.Array) -> jax.Array:
                    mask = (jnp.arange(T) == position).reshape(1, T, *[1] * (x.ndim - 2))
                    return jnp.where(mask, other[site], x)

                return measure(sites.forward(model, params, ids_BT, changes={site: change}, **more).logits_BTV)

            return jax.lax.map(patched, jnp.arange(T))

        return jnp.stack([at_site(site) for site in where])

    return measured(params)


def heads(model: nn.Module, params: Any, ids_BT: Any, from_ids_BT: Any, measure: Measure, **more: Any) -> jax.Array:
    """The measure of a text with one head, at all positions, patched from another text, [L, H, B].

    Arguments are those of `by_position`.

    Raises:
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    L, H = num_blocks(model), model.config.heads  # type: ignore[attr-defined]

    @jax.jit
    def measured(params: Any) -> jax.Array:
        other = sites.forward(model, params, from_ids_BT, "|".join(map(heads_site, range(L))), **more).activations

        def patched(number: jax.Array) -> jax.Array:
            def change(layer: int) -> sites.Change:
                mask = head_mask(model, number % H) * (number // H == layer)
                return lambda x: jnp.where(mask > 0, other[heads_site(layer)], x)

            changes = {heads_site(layer): change(layer) for layer in range(L)}
            return measure(sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV)

        return jax.lax.map(patched, jnp.arange(L * H)).reshape(L, H, -1)

    return measured(params)


def path_patching(
    model: nn.Module,
    params: Any,
    ids_BT: Any,
    from_ids_BT: Any,
    sender: tuple[int, int] | str,
    receivers: Sequence[str],
    **more: Any,
) -> jax.Array:
    """Logits_BTV of a text with the direct paths from a sender to receivers patched from another text.

    All sublayers but the sender's are frozen, so that the sender's output reaches the receivers through the residual
    stream alone and through no sublayer in between. Everything after the receivers is recomputed.

    Args:
      model: a decoder or an encoder.
      params: of the model.
      ids_BT: the text to patch.
      from_ids_BT: the text whose sender output is patched in.
      sender: a head, by layer and number, or a sublayer, such as "block_0/mlp".
      receivers: input sites, such as "block_1/attention/qkv.in" or "final_norm.in".
      **more: other inputs of the model, by name.

    Raises:
      DataError: the model has no such receiver.
      ConfigError: the model is neither a decoder nor an encoder made of blocks.
    """
    L = num_blocks(model)
    name = sender if isinstance(sender, str) else heads_site(sender[0])
    sublayers = [f"block_{i}/{part}" for i in range(L) for part in ("attention", "mlp")]

    @jax.jit
    def patched(params: Any) -> jax.Array:
        sent = sites.forward(model, params, from_ids_BT, name, **more).activations[name]
        clean = sites.forward(model, params, ids_BT, "|".join(sublayers), **more).activations

        def send(x: jax.Array) -> jax.Array:
            return sent if isinstance(sender, str) else jnp.where(head_mask(model, sender[1]) > 0, sent, x)

        frozen = {site: x for site, x in clean.items() if not name.startswith(site)}
        received = sites.forward(model, params, ids_BT, "|".join(receivers), frozen | {name: send}, **more).activations
        # A receiver that does not exist raises in the last forward pass.
        changes = {site: received.get(site, jnp.zeros(())) for site in receivers}
        return sites.forward(model, params, ids_BT, changes=changes, **more).logits_BTV

    return patched(params)


def recovered_fraction(patched: jax.Array, corrupted: jax.Array, clean: jax.Array) -> jax.Array:
    """Fraction of the difference between the clean and the corrupted measure that a patch recovers: 0 none, 1 all."""
    return (patched - corrupted) / (clean - corrupted)
