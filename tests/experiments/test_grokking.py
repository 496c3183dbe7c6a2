"""The experiment on grokking: its pairs, its Fourier norms, and when it says that a side is solved."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def addition():
    found = importlib.util.spec_from_file_location("addition", ROOT / "experiments" / "grokking" / "addition.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_sides_are_all_pairs_once_and_right(addition, tmp_path):
    train, held_out = addition.sides(7, 0.4, 0)
    both = np.concatenate([train, held_out])
    assert len(train) == 20 and len({(a, b) for a, b, _ in both.tolist()}) == 49
    assert ((both[:, 0] + both[:, 1]) % 7 == both[:, 2]).all()
    addition.write_pairs(tmp_path, train, held_out)
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert len(rows) == 29 and all(len(row[key]) == 1 for row in rows for key in "abc")


def test_norms_of_frequencies_are_those_of_products_with_cosines_and_sines(addition):
    p, table_PD = 11, np.random.default_rng(0).normal(size=(11, 4))
    at = 2 * np.pi * np.arange(1, 6)[:, None] * np.arange(p) / p
    waves = np.sqrt(2 / p) * np.stack([np.cos(at), np.sin(at)])
    assert addition.spectrum(table_PD) == pytest.approx(np.sqrt(((waves @ table_PD) ** 2).sum((0, 2))))
    assert addition.concentration(np.array([3.0, 0, 0, 0, 0, 0, 4.0])) == 1


def test_a_side_is_solved_where_it_stays_so(addition):
    looks = [{"step": i, "train/accuracy": value} for i, value in enumerate([0.5, 1.0, 0.7, 0.99, 1.0])]
    assert addition.reached(looks, "train") == 3
    assert addition.reached(looks[:3], "train") is None


def test_quality_against_the_formula(addition):
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    found = addition.quality(logits, np.array([1, 2]))
    assert found == pytest.approx({"accuracy": 0.5, "loss": -(np.log(0.25) + np.log(0.8)) / 2})
