"""A run in a notebook: its table, its logits, what it refuses."""

import numpy as np
import pytest

import gptjax
from gptjax.config import CheckpointError, DataError
from gptjax.inspect import parameters


@pytest.fixture(scope="module")
def run(trained):
    return gptjax.load(trained)


def test_rows_have_shape_count_and_norm():
    (row,) = parameters.rows({"a": {"kernel": np.array([[3.0, 0.0], [0.0, 4.0]], "f")}})
    assert row == parameters.Row("a/kernel", (2, 2), "float32", 4, 5.0)


def test_a_run_shows_itself(run):
    text, html = repr(run), run._repr_html_()
    total = sum(p.size for p in __import__("jax").tree.leaves(run.params))
    assert "block_0/attention/qkv/kernel" in text and "16 x 48" in text and f"{total:,}" in text
    assert "<" in html and "kernel" in html and "norm" in html


def test_logits_are_numpy_in_and_out_and_equal_the_models(run):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits = run.logits(ids)
    assert type(logits) is np.ndarray and logits.shape == (2, 3, 257) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, run.model.apply({"params": run.params}, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([1, 2], r"shape \[B, T\]"),
        ([[0.5]], "whole numbers"),
        ([[257]], "0 to 256"),
        ([[-1]], "0 to 256"),
        ([[0] * 17], "17 tokens are more"),
    ],
)
def test_ids_that_cannot_be_are_refused(run, ids, expected):
    with pytest.raises(DataError, match=expected):
        run.logits(ids)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no run: it has no config.json"):
        gptjax.load(tmp_path)
