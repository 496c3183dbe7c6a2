"""A tiny decoder and its forward pass in NumPy, the reference for tests of gptjax.interpret."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config

from gptjax import models
from gptjax.runs import config as configs

IDS = np.arange(2 * 9).reshape(2, 9) * 7 % 257


@cache
def made(**changes):
    """A tiny model with large random parameters, so that each part matters."""
    config = configs.with_vocabulary(tiny_config(**changes), 257)
    model = models.build(config.model)
    shapes, rng = models.shapes(model), np.random.default_rng(0)

    def drawn(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        return jnp.asarray(values + (path[-1].key == "scale"))

    return model, jax.tree_util.tree_map_with_path(drawn, shapes)


def normed(x, of):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(
        of["scale"], np.float64
    ) + of.get("bias", 0)


def linear(x, of):
    return x @ np.asarray(of["kernel"], np.float64) + of.get("bias", 0)


def written_out(params, ids_BT):
    """The tiny recipe's forward pass: its sites, and attention weights by layer."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    activations, (B, T), H, K = {}, ids_BT.shape, 2, 8
    activations["tokens"] = params["tokens"]["embedding"][ids_BT]
    x = activations["tokens"] + params["positions"]["embedding"][:T]
    for i in range(2):
        of = params[f"block_{i}"]
        activations[f"block_{i}.in"] = x
        qkv = linear(normed(x, of["attention_norm"]), of["attention"]["qkv"]).reshape(B, T, H, 3, K)
        q, k, v = np.moveaxis(qkv, 3, 0)
        scores = np.where(np.tri(T, dtype=bool), np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        activations[f"weights_{i}"] = weights / weights.sum(-1, keepdims=True)
        heads = np.einsum("bhts,bshk->bthk", activations[f"weights_{i}"], v).reshape(B, T, H * K)
        activations[f"block_{i}/attention/out.in"] = heads
        activations[f"block_{i}/attention"] = linear(heads, of["attention"]["out"])
        x = x + activations[f"block_{i}/attention"]
        up = linear(normed(x, of["mlp_norm"]), of["mlp"]["up"])
        activations[f"block_{i}/mlp/down.in"] = np.asarray(jax.nn.gelu(jnp.asarray(up), approximate=True))
        activations[f"block_{i}/mlp"] = linear(activations[f"block_{i}/mlp/down.in"], of["mlp"]["down"])
        x = x + activations[f"block_{i}/mlp"]
        activations[f"block_{i}"] = x
    activations["logits"] = normed(x, params["final_norm"]) @ params["tokens"]["embedding"].T
    return activations
