"""Parameter changes against hand-computed values, and the list of checkpoints."""

import numpy as np
import pytest

import gptjax
from gptjax.interpret import changes


def test_moves_by_hand():
    before = {"blocks": {"w": np.array([[3.0, 4.0], [0.0, 0.0]])}, "scale": np.array([1.0])}
    after = {"blocks": {"w": np.array([[4.0, -3.0], [0.0, 2.0]])}, "scale": np.array([1.5])}
    result = changes.parameter_changes(before, after)
    assert list(result) == ["block_0/w", "block_1/w", "scale"]
    assert result["block_0/w"] == (5.0, pytest.approx(np.sqrt(50)), 0.0)
    assert result["block_1/w"] == (0.0, 2.0, 0.0) and result["block_1/w"].ratio == np.inf
    assert result["scale"].ratio == 0.5 and result["scale"].cosine == 1.0
    assert changes.as_text(result).splitlines()[1].split() == ["block_0/w", "5.000", "7.071", "1.4142", "0.0000"]


def test_rows_that_moved():
    result = changes.row_changes(np.array([[3.0, 4], [1, 0]]), np.array([[3.0, 4], [1, 2]]))
    assert result.tolist() == [0.0, 2.0]


def test_checkpoints_of_a_run(trained):
    first, last = changes.steps(trained)
    assert (first, last) == (4, 8)
    moved = changes.parameter_changes(gptjax.load(trained, first).params, gptjax.load(trained, last).params)
    assert all(0 < own.distance < own.before and own.cosine > 0.9 for own in moved.values())
    assert changes.steps(trained.parent) == []
