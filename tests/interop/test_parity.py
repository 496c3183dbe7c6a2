"""Parity of every family with transformers: logits, loss and gradients, live or with golden files.

`pytest tests/interop/test_parity.py -s` prints the largest error of each.
"""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from gptjax import models
from gptjax.core import hub
from gptjax.interop import convert_run, families, weight_mapping
from gptjax.objectives.causal import causal

sys.path.append(str(ROOT / "tests" / "golden"))
import make_hf

WITH_GRADIENTS = ("gpt2", "llama")


def imported(folder):
    """Returns the model, parameters and tensors of a folder."""
    family, config = families.model_of(hub.read_json(folder / "config.json"))
    params = convert_run.read_params(folder, family, config)
    return models.build(config), params, families.tensors_of(family, config)


def check_gradients(model, params, tensors, found):
    ids = found["ids"]
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones(ids[:, 1:].shape, "f")}
    loss, grads = jax.jit(jax.value_and_grad(lambda p: causal(model)(p, batch, None)[0] / ids[:, 1:].size))(params)
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)
    worst = 0.0
    for tensor in tensors:
        theirs = weight_mapping.from_hf(tensor, [found[f"grads/{name}"] for name in tensor.hf_names])
        ours = grads
        for name in tensor.name.split("/"):
            ours = ours[name]
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, f"{tensor.name}: {error}"
        worst = max(worst, float(error))
    return worst


def check(folder, label):
    found = np.load(folder / "expected.npz")
    model, params, tensors = imported(folder)
    logits = jax.jit(lambda p: models.logits(model, p, found["ids"][:, :-1]))(params)
    error = float(np.abs(logits - found["logits"]).max())
    assert np.abs(found["logits"]).max() > 0.3, "logits that say something"
    assert error < 1e-4
    grads = check_gradients(model, params, tensors, found) if any(n.startswith("grads/") for n in found.files) else None
    print(f"\n{label}: logits within {error:.1e}" + (f", gradients {grads:.1e} relative" if grads else ""))


@pytest.mark.thorough
@pytest.mark.parametrize("family, case", [(family, case) for family, cases in make_hf.CASES.items() for case in cases])
def test_equals_transformers(family, case, tmp_path):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    make_hf.make(family, case, tmp_path, seed=1, gradients=family in WITH_GRADIENTS)
    check(tmp_path, f"{family} {case}")


@pytest.mark.thorough
@pytest.mark.parametrize("family", make_hf.CASES)
def test_equals_its_golden_file(family):
    check(make_hf.FOLDER / family, f"{family}, golden")
