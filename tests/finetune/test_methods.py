"""Fine-tuning methods on each architecture: what is trained and added; additions have no effect at first."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE, tiny_config

from gptjax import models
from gptjax.finetune import methods, paths

MODELS = {
    "gpt2": dict(model_use_bias=True),
    "modern": dict(
        model_positions="rotary",
        model_norm="rmsnorm",
        model_qk_norm="head",
        model_kv_heads=1,
        model_activation="swiglu",
    ),
    "scanned": dict(model_scan_layers=True, model_use_bias=True),
    "experts": dict(model_mlp="experts", model_experts=3),
    "encoder": dict(model_arch="encoder", model_use_bias=True, model_norm_position="post"),
    "seq2seq": dict(model_arch="seq2seq", model_use_bias=True),
    "lstm": dict(model_arch="recurrent", model_use_bias=True),
    "bahdanau": dict(model_arch="seq2seq", model_encoder="gru", model_decoder="lstm", model_use_bias=True),
}
RECURRENT = ("lstm", "bahdanau")
QUICK = ("gpt2", "seq2seq")
ADDITIVE = ("lora", "dora", "adalora", "ia3", "adapter")
FOLDS = ("lora", "dora", "adalora", "ia3")


def built(name, method, **changes):
    """(base, tuned, frozen, the model with additions, the model without)."""
    changes = {f"finetune_{key}": value for key, value in changes.items()}
    config = tiny_config(**MODELS[name], model_vocabulary=40, finetune_method=method, finetune_rank=3, **changes)
    plain = models.build(config.model)
    fresh = models.init(plain, jax.random.key(1))
    base = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), fresh)
    tuned, frozen = methods.partition(base, config, jax.random.key(3), fresh)
    return base, tuned, frozen, methods.build_model(config), plain


def texts(model, rows=2, length=9):
    """Inputs of a model."""
    ids = jax.random.randint(jax.random.key(0), (rows, length), 0, 40)
    if models.kind(model) != "seq2seq":
        return {"ids_BT": ids}
    return {"ids_BT": ids, "source_BS": ids[:, ::-1], "source_segments_BS": jnp.ones_like(ids)}


def stirred(tree, by=0.3):
    """Parameters as training might leave them."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(
        structure, [leaf + by * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def cases(some):
    return [
        pytest.param(name, method, marks=() if name in QUICK else pytest.mark.slow)
        for name in MODELS
        for method in some
        if not (name in RECURRENT and method in ("ia3", "adapter", "prefix"))
    ]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "method"), cases(ADDITIVE))
def test_additions_have_no_effect_at_first(name, method):
    base, tuned, frozen, model, plain = built(name, method)
    assert not set(paths.flat(tuned)) & set(paths.flat(base))
    read = texts(plain)
    jit = partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    there = jit(lambda params: models.logits(model, params, **read))(paths.union(frozen, tuned))
    np.testing.assert_array_equal(there, jit(lambda params: models.logits(plain, params, **read))(base))


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "method"), cases(FOLDS))
def test_merged_model_gives_the_same_outputs(name, method):
    base, tuned, frozen, model, plain = built(name, method)
    params, read = paths.union(frozen, stirred(tuned)), texts(plain)
    merged = methods.merge_additions(params, model.attached)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    there = models.logits(model, params, **read)
    assert jnp.abs(there - models.logits(plain, base, **read)).max() > 1e-3
    np.testing.assert_allclose(there, models.logits(plain, merged, **read), atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "method"), cases(("adapter", "prefix", "lora")))
def test_cached_decoding_with_additions(name, method):
    _, tuned, frozen, model, plain = built(name, method)
    if models.kind(model) == "encoder":
        return
    params, read = paths.union(frozen, stirred(tuned)), texts(plain)
    whole = models.logits(model, params, **read)
    few, own = models.for_decoding(model, params)
    cache = models.init_cache(few, 2, 16, 4, "float32")
    if models.kind(model) == "seq2seq":
        cache = models.encode_source(few, own, read["source_BS"], read["source_segments_BS"], cache)
    for start in (0, 4, 8):
        piece = read["ids_BT"][:, start : start + 4]
        x, table, cache = models.extend(few, own, piece, cache)
        np.testing.assert_allclose(models.next_logits(few, x, table), whole[:, start : start + 4], atol=2e-5, rtol=1e-4)
