"""GPT-2 against transformers: logits, loss and gradients, live with the parity extra, and a golden file anywhere."""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gptjax import config as configs
from gptjax import models
from gptjax.objectives.causal import causal

sys.path.append(str(ROOT / "tests" / "golden"))
import make_gpt2

SHAPES = {
    "tiny": dict(layers=2, heads=3, width=24, context=12, vocabulary=31, batch=2, length=9),
    "odd": dict(layers=1, heads=5, width=35, context=7, vocabulary=101, batch=1, length=7),
    "deep": dict(layers=6, heads=2, width=16, context=33, vocabulary=64, batch=3, length=20),
    "one_head": dict(layers=2, heads=1, width=11, context=5, vocabulary=17, batch=2, length=1),
}


def nested(found, prefix):
    tree = {}
    for name, value in found.items():
        if name.startswith(prefix):
            *folders, leaf = name.removeprefix(prefix).split("/")
            at = tree
            for folder in folders:
                at = at.setdefault(folder, {})
            at[leaf] = value
    return tree


def check(found, layers, heads, width, context, vocabulary, **_):
    config = tiny_config(
        model_layers=layers, model_heads=heads, model_width=width, model_context=context, model_use_bias=True
    )
    model = models.build(configs.with_vocabulary(config, vocabulary).model)
    params, ids = nested(found, "params/"), found["ids"]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids[:, :1])["params"])
    assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda p: p.shape, params), "the same parameters"
    np.testing.assert_allclose(models.logits(model, params, ids[:, :-1]), found["logits"], atol=1e-4, rtol=0)
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones(ids[:, 1:].shape, "f")}
    loss, grads = jax.value_and_grad(lambda p: causal(model)(p, batch, None)[0] / ids[:, 1:].size)(params)
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(nested(found, "grads/")), strict=True
    ):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("name", SHAPES)
def test_gpt2_equals_transformers(name):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    check(make_gpt2.arrays(**SHAPES[name]), **SHAPES[name])


def test_gpt2_equals_its_golden_file():
    check(dict(np.load(make_gpt2.PATH)), **SHAPES["tiny"])
