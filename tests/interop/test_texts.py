"""Generated texts of BART, Marian and T5, greedy and by beam search, against transformers, live or golden."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from gptjax import models
from gptjax.decode import beam, prefill
from gptjax.decode.beam import BeamSearchParams
from gptjax.interop import convert_run

sys.path.append(str(ROOT / "tests" / "golden"))
import make_hf_encoders
import make_texts


def imported(folder):
    """A Reader of a folder's model, and its config."""
    family, config = convert_run.read_model(folder)
    params = jax.tree.map(jnp.asarray, convert_run.read_params(folder, family, config))
    return prefill.decoder(models.build(config), params), ConfigDict(config)


def check(of, start, case, expected):
    beams, penalty, stopping = case
    settings = BeamSearchParams(beams, length_penalty=penalty, early_stopping=stopping, best=beams)
    prompts = [[one for one in start if one is not None]] * len(make_texts.SOURCES)
    found = beam.search(of, prompts, settings, make_texts.MAX_TOKENS, make_texts.ENDS, sources=make_texts.SOURCES)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.ids for one in ours] == [ids for ids, _ in theirs]
        if beams > 1:
            np.testing.assert_allclose([one.score for one in ours], [score for _, score in theirs], rtol=1e-4)


@pytest.mark.parametrize("family", make_texts.FAMILIES)
@pytest.mark.slow
def test_texts_equal_transformers(family, tmp_path):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    model = make_hf_encoders.make(family, "golden", tmp_path, seed=4)
    of, config = imported(tmp_path)
    forced = make_texts.FORCED.get(family)
    for case in make_texts.CASES[:2]:
        expected = make_texts.written(model, config.start, forced, config.suppress_tokens, *case)
        check(of, (config.start, forced), case, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("family", make_texts.FAMILIES)
def test_texts_equal_their_golden_file(family):
    golden = json.loads(make_texts.GOLDEN.read_text())[family]
    of, config = imported(make_hf_encoders.FOLDER / family)
    lengths = {len(ids) for case in golden for each in case for ids, _ in each}
    assert len(lengths) > 3, "some end before the others"
    for case, expected in zip(make_texts.CASES, golden, strict=True):
        check(of, (config.start, make_texts.FORCED.get(family)), case, expected)
