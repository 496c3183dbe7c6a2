"""Direct logit attribution: a logit as a sum of contributions of each head, each MLP and the embedding.

The statistics of the final norm are held fixed, so that logits are linear in the residual stream (arXiv 2211.00593).
For decoders and encoders with pre-norm blocks. Pure functions of (model, params, ids).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.interpret import sites
from gptjax.interpret.ablation import head_mask, heads_site
from gptjax.interpret.lens import num_blocks


def components(model: nn.Module, params: Any, ids_BT: Any, **more: Any) -> dict[str, jax.Array]:
    """Additive components of the residual stream, [B, T, D] each; their sum is the input of the final norm.

    By name: "embedding" (with positions), "block_0/head_0", ..., "block_0/attention" (the bias, and anything else that
    no head outputs), "block_0/mlp", and so on.

    Raises:
      ConfigError: see `attribution`.
    """
    L = _validated_layers(model)
    model, params = models.unroll_layers(model, params)
    heads = range(model.config.heads)  # type: ignore[attr-defined]
    pattern = r"block_0\.in|block_\d+/(attention|mlp|attention/out\.in)"

    @jax.jit
    def compute(params: Any) -> dict[str, jax.Array]:
        captured = sites.capture(model, params, ids_BT, pattern, **more)
        result = {"embedding": captured["block_0.in"]}
        for i in range(L):
            mixed, kernel = captured[heads_site(i)], params[f"block_{i}"]["attention"]["out"]["kernel"]
            by_head = {f"block_{i}/head_{h}": mixed * head_mask(model, h) @ kernel for h in heads}
            rest = captured[f"block_{i}/attention"] - sum(by_head.values())
            result |= by_head | {f"block_{i}/attention": rest, f"block_{i}/mlp": captured[f"block_{i}/mlp"]}
        return result

    result = compute(params)
    order = [name for i in range(L) for name in _names(i, heads)]
    return {name: result[name] for name in ["embedding", *order]}


def attribution(model: nn.Module, params: Any, ids_BT: Any, tokens_BT: Any, **more: Any) -> dict[str, jax.Array]:
    """Contributions of `components`, and of the biases of the final norm and the head, to a token's logit, [B, T] each.

    Their sum is the logit, before the softcap if the model has one.

    Args:
      model: a decoder or an encoder.
      params: of the model.
      ids_BT: token ids.
      tokens_BT: the tokens whose logits are attributed; for a difference of logits, subtract the results of two calls.
      **more: other inputs of the model, by name.

    Raises:
      ConfigError: the model has post-norm blocks, a transform before its head, or no blocks.
    """
    parts = components(model, params, ids_BT, **more)
    config = model.config  # type: ignore[attr-defined]
    stream_BTD = sum(parts.values(), start=jnp.zeros(()))
    norm, center = params["final_norm"], config.norm == "layernorm"

    def centered(x_BTD: jax.Array) -> jax.Array:
        return x_BTD - x_BTD.mean(-1, keepdims=True) if center else x_BTD

    scale_BT1 = jax.lax.rsqrt((centered(stream_BTD) ** 2).mean(-1, keepdims=True) + config.norm_epsilon)
    rows_BTD = _table(params, config)[jnp.asarray(tokens_BT)] * config.logit_scale

    def logit(x_BTD: jax.Array) -> jax.Array:
        return (centered(x_BTD) * scale_BT1 * norm["scale"] * rows_BTD).sum(-1)

    result = {name: logit(x_BTD) for name, x_BTD in parts.items()}
    bias_BT = (norm["bias"] * rows_BTD).sum(-1) if "bias" in norm else jnp.zeros(rows_BTD.shape[:2])
    if config.head_bias:
        bias_BT = bias_BT + params["head_bias"][jnp.asarray(tokens_BT)]
    return result | {"biases": bias_BT}


def _names(layer: int, heads: range) -> list[str]:
    return [*(f"block_{layer}/head_{h}" for h in heads), f"block_{layer}/attention", f"block_{layer}/mlp"]


def _table(params: Any, config: Any) -> jax.Array:
    table_VD: jax.Array = params["tokens"]["embedding"] if config.tied_head else params["head"]["kernel"].T
    return table_VD


def _validated_layers(model: nn.Module) -> int:
    L, config = num_blocks(model), model.config  # type: ignore[attr-defined]
    if config.norm_position != "pre" or config.head_transform:
        raise ConfigError("direct logit attribution needs a model with pre-norm blocks and a linear head")
    return L
