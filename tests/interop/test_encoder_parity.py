"""Parity of BERT, BART, Marian and T5 with transformers, live with the parity extra, and with golden files anywhere.

`pytest tests/interop/test_encoder_parity.py -s` prints the largest error of each.
"""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from gptjax import models
from gptjax.interop import convert_run

sys.path.append(str(ROOT / "tests" / "golden"))
import make_hf_encoders


def check(folder, label):
    found = dict(np.load(folder / "expected.npz"))
    family, config = convert_run.read_model(folder)
    params, model = convert_run.read_params(folder, family, config), models.build(config)
    read = {name: array for name, array in found.items() if name not in ("logits", "answers")}
    said = {}
    if "logits" in found:
        said["logits"] = jax.jit(lambda p: models.logits(model, p, **read))(params)
    if "answers" in found:
        said["answers"] = jax.jit(lambda p: models.task_output(model, p, read))(params)
    # What is said of padding means nothing.
    real = read.get("segments_BT", np.ones_like(read["ids_BT"])) > 0
    for name, ours in said.items():
        theirs = found[name]
        assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.1
        both = (x[real] if x.shape[:2] == real.shape and x.ndim == 3 else x for x in (np.asarray(ours), theirs))
        error = float(np.abs(np.subtract(*both)).max())
        assert error < 1e-4, f"{name} of {label}: {error}"
        print(f"\n{label}: {name} within {error:.1e}")
    return said


CASES = [(family, case) for family, cases in make_hf_encoders.CASES.items() for case in cases]


@pytest.mark.thorough
@pytest.mark.parametrize("family, case", CASES)
def test_equals_transformers(family, case, tmp_path):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    make_hf_encoders.make(family, case, tmp_path, seed=1)
    assert check(tmp_path, f"{family} {case}")


@pytest.mark.thorough
@pytest.mark.parametrize("family", make_hf_encoders.CASES)
def test_equals_its_golden_file(family):
    assert check(make_hf_encoders.FOLDER / family, f"{family}, golden")
