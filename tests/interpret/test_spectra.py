"""Spectra, nearest neighbors and top examples of neurons on known inputs."""

import jax.numpy as jnp
import numpy as np
from written_out import IDS, made, written_out

from gptjax.interpret import neurons, spectra


def test_singular_values_are_those_of_each_layer():
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    params = {"blocks": {"out": {"kernel": jnp.asarray(np.stack([turn @ np.diag([1, 5, 2, 0.5]), np.eye(4)]))}}}
    result = spectra.singular_values(params)
    assert list(result) == ["block_0/out/kernel", "block_1/out/kernel"]
    np.testing.assert_allclose(result["block_0/out/kernel"], [5, 2, 1, 0.5], rtol=1e-5)
    np.testing.assert_allclose(spectra.effective_rank(result["block_1/out/kernel"]), 4)
    np.testing.assert_allclose(spectra.effective_rank(np.array([3.0, 0, 0])), 1)


def test_unit_arrays_have_a_mean_square_of_one():
    result = spectra.normalize_rms({"a": np.array([[3.0, 4.0]]), "b": np.array([-2.0])})
    np.testing.assert_allclose(result["a"], np.array([[3, 4]]) / np.sqrt(12.5))
    assert result["b"].tolist() == [-1.0]


def test_neighbors_have_large_cosines():
    table = np.array([[1, 0], [5, 0.5], [0, 1], [-1, 0], [0, 0]], np.float32)
    ids, cosines = spectra.neighbors(table, [0, 3], k=2)
    assert ids[0].tolist() == [1, 2] and ids[1, 0] in (2, 4)
    np.testing.assert_allclose(cosines[0], [5 / np.hypot(5, 0.5), 0], rtol=1e-6)


def test_a_neuron_is_largest_where_it_says():
    model, params = made()
    result = neurons.top_examples(model, params, IDS, "block_1/mlp/down.in", [3, 60], k=4)
    values = written_out(params, IDS)["block_1/mlp/down.in"]
    for number, column in enumerate((3, 60)):
        np.testing.assert_allclose(result.values[number], np.sort(values[..., column].ravel())[::-1][:4], atol=1e-3)
        np.testing.assert_allclose(
            values[result.rows[number], result.positions[number], column], result.values[number], atol=1e-3
        )


def test_columns_of_any_array_are_searched():
    x_BTF = np.zeros((2, 3, 2))
    x_BTF[1, 0, 0], x_BTF[0, 2, 0], x_BTF[1, 2, 1], x_BTF[0, 1, 1] = 5, 4, 3, 2
    result = neurons.largest(x_BTF, k=2)
    np.testing.assert_array_equal(result.values, [[5, 4], [3, 2]])
    np.testing.assert_array_equal(result.rows, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(result.positions, [[0, 2], [2, 1]])
