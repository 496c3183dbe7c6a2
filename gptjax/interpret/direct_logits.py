"""Direct logit attribution: a logit as a sum of what each head, each MLP and the embedding write into the stream.

The last norm's statistics are taken as they are, so that what is behind the stream is linear (as in arXiv
2211.00593). Of decoders and encoders whose norms come before the sublayers. Pure functions of (model, params, ids).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import sites
from gptjax.interpret.ablation import columns, heads_site
from gptjax.interpret.lens import blocks


def parts(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> dict[str, jax.Array]:
    """What is added to the residual stream, [B, T, D] each; in sum what the last norm reads.

    By name: "embedding" (with positions), "block_0/head_0", ..., "block_0/attention" (a bias, and what else is not a
    head's), "block_0/mlp", and so on.

    Raises:
      ConfigError: as of `attributed`.
    """
    L = _checked(model)
    model, params = models.unroll_layers(model, params)
    heads = range(model.config.heads)  # type: ignore[attr-defined]
    wanted = r"block_0\.in|block_\d+/(attention|mlp|attention/out\.in)"

    @jax.jit
    def of(params: Any) -> dict[str, jax.Array]:
        kept = sites.capture(model, params, ids_BT, wanted, **more)
        found = {"embedding": kept["block_0.in"]}
        for i in range(L):
            mixed, kernel = kept[heads_site(i)], params[f"block_{i}"]["attention"]["out"]["kernel"]
            own = {f"block_{i}/head_{h}": mixed * columns(model, h) @ kernel for h in heads}
            rest = kept[f"block_{i}/attention"] - sum(own.values())
            found |= own | {f"block_{i}/attention": rest, f"block_{i}/mlp": kept[f"block_{i}/mlp"]}
        return found

    found = of(params)
    order = [name for i in range(L) for name in _names(i, heads)]
    return {name: found[name] for name in ["embedding", *order]}


def attributed(model: nn.Module, params: Any, ids_BT: Any, tokens_BT: Any, **more: Any) -> dict[str, jax.Array]:
    """What each of `parts`, and the biases behind the stream, add to a token's logit at each position, [B, T].

    Their sum is the logit, before a softcap where the model has one.

    Args:
      model: a decoder or an encoder.
      params: of the model.
      ids_BT: what it reads.
      tokens_BT: whose logits; of the difference of two logits, subtract what this gives for each.
      **more: what else the model reads, by name.

    Raises:
      ConfigError: a model whose norms come after the sublayers, with a transform before its head, or without blocks.
    """
    written = parts(model, params, ids_BT, **more)
    config = model.config  # type: ignore[attr-defined]
    stream_BTD = sum(written.values(), start=jnp.zeros(()))
    norm, centre = params["final_norm"], config.norm == "layernorm"

    def centred(x_BTD: jax.Array) -> jax.Array:
        return x_BTD - x_BTD.mean(-1, keepdims=True) if centre else x_BTD

    scale_BT1 = jax.lax.rsqrt((centred(stream_BTD) ** 2).mean(-1, keepdims=True) + config.norm_epsilon)
    rows_BTD = _table(params, config)[jnp.asarray(tokens_BT)] * config.logit_scale

    def logit(x_BTD: jax.Array) -> jax.Array:
        return (centred(x_BTD) * scale_BT1 * norm["scale"] * rows_BTD).sum(-1)

    found = {name: logit(x_BTD) for name, x_BTD in written.items()}
    bias_BT = (norm["bias"] * rows_BTD).sum(-1) if "bias" in norm else jnp.zeros(rows_BTD.shape[:2])
    if config.head_bias:
        bias_BT = bias_BT + params["head_bias"][jnp.asarray(tokens_BT)]
    return found | {"biases": bias_BT}


def _names(layer: int, heads: range) -> list[str]:
    return [*(f"block_{layer}/head_{h}" for h in heads), f"block_{layer}/attention", f"block_{layer}/mlp"]


def _table(params: Any, config: Any) -> jax.Array:
    table_VD: jax.Array = params["tokens"]["embedding"] if config.tied_head else params["head"]["kernel"].T
    return table_VD


def _checked(model: nn.Module) -> int:
    L, config = blocks(model), model.config  # type: ignore[attr-defined]
    if config.norm_position != "pre" or config.head_transform:
        raise ConfigError("logits are sums of parts only where norms come before sublayers and the head is linear")
    return L
