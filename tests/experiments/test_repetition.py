"""What notebook 3 trains: tokens said again and again, and a model that learns of them what can be learnt at once."""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from experiments.notebooks import repetition

TINY = ["--config.model.width=16", "--config.model.heads=2", "--config.model.context=16", "--config.data.batch_size=4"]


def test_rows_repeat_themselves_after_periods_of_their_own():
    ids_BT = np.asarray(repetition.periodic(jax.random.key(0), 64, 32, 1000))
    periods = [next(p for p in range(1, 32) if (row[p:] == row[:-p]).all()) for row in ids_BT]
    assert min(periods) >= 4 and max(periods) <= 16 and len(set(periods)) > 5


@pytest.mark.slow
def test_looks_are_of_the_model_that_is_given_back(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, told = repetition.recipe(TINY, vocabulary=8), []
    model, params, looks = repetition.trained(config, 20, 10, told.append)
    assert [look.step for look in looks] == [0, 10, 20] and told == looks
    assert looks[0].first == pytest.approx(np.log(8), abs=0.1)
    assert looks[0].scores_LH.shape == (2, 2) and (looks[0].scores_LH <= 1).all()
    assert model.config.vocabulary == 8 and params["tokens"]["embedding"].shape == (8, 16)
    other = repetition.trained(config, 20, 20)[1]
    assert (np.asarray(other["tokens"]["embedding"]) == np.asarray(params["tokens"]["embedding"])).all()


@pytest.mark.slow
def test_an_induction_head_forms(monkeypatch):
    """Copies are known, and one head of the second layer reads what came after the first copy (arXiv 2209.11895)."""
    monkeypatch.chdir(ROOT)
    looks = repetition.trained(repetition.recipe(), 600, 200)[2]
    assert looks[0].again > 4 and looks[-1].again < 1
    assert looks[-1].scores_LH[1].max() > 0.7 > 10 * looks[0].scores_LH.max()
