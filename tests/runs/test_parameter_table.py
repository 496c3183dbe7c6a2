"""A run in a notebook: its table, its logits, and refused inputs."""

import jax
import numpy as np
import pytest
import treescope

import gptjax
from gptjax.config.errors import CheckpointError, DataError
from gptjax.runs import parameter_table


@pytest.fixture(scope="module")
def run(trained):
    return gptjax.load(trained)


def test_rows_have_shape_count_and_norm_and_folders_their_sum():
    tree = {"a": {"kernel": np.array([[3.0, 0.0], [0.0, 4.0]], "f"), "bias": np.array([12.0], "f")}}
    found = [(row.path, row.shape, row.size, row.norm) for row in parameter_table.rows(tree)]
    assert found == [
        ((), "", 5, 13.0),
        (("a",), "", 5, 13.0),
        (("a", "kernel"), "2 x 2", 4, 5.0),
        (("a", "bias"), "1", 1, 12.0),
    ]


def test_a_scalar_has_its_line():
    text = parameter_table.as_text({"share": np.array(0.5, "f"), "w": np.ones(3, "f")})
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["share", "one", "1", "0.500"],
        ["w", "3", "3", "1.732"],
    ]


def test_a_run_has_a_text_representation(run):
    lines = repr(run).splitlines()
    total = sum(p.size for p in jax.tree.leaves(run.params))
    assert any(line.split()[:4] == ["block_0/attention/qkv/kernel", "16", "x", "48"] for line in lines)
    assert lines[-1].split()[:2] == ["total", f"{total:,}"]


def test_a_run_has_an_html_representation(run):
    text = treescope.render_to_text(parameter_table.Table(run.params, "runs/tiny"))
    norm = np.linalg.norm(run.params["block_0"]["attention"]["qkv"]["kernel"])
    assert "runs/tiny" in text and f"16 x 48           768  {norm:10.3f}" in text
    assert run._repr_html_().startswith("<"), "notebooks take HTML"


@pytest.mark.slow
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
def test_invalid_ids_are_refused(run, ids, expected):
    with pytest.raises(DataError, match=expected):
        run.logits(ids)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run: it has no config.json"):
        gptjax.load(tmp_path)


def test_a_sharding_is_rendered():
    shown = parameter_table.sharding_html(jax.numpy.zeros((4, 8)))
    assert "<" in shown and len(shown) > 200
