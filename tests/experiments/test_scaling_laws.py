"""The fits of scaling laws find the constants that made their data; the ladder spends what it says."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import optimize

FOLDER = ROOT / "experiments" / "scaling_laws"


@pytest.fixture(scope="module")
def fits():
    sys.path.append(str(FOLDER))
    import fits

    yield fits
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def scaling(fits):
    found = importlib.util.spec_from_file_location("scaling", FOLDER / "scaling.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grid():
    n, d = np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 1e8, 5))
    return n.ravel(), d.ravel()


@pytest.mark.slow
def test_known_constants_are_found_again(fits, grid):
    true = fits.Law(1.7, 400.0, 410.0, 0.34, 0.28)
    found = fits.parametric(*grid, true.loss(*grid), fits.STARTS[::9])
    assert found == pytest.approx(true, rel=0.02)
    assert found.exponents() == pytest.approx((0.28 / 0.62, 0.34 / 0.62), rel=0.02)


def test_the_gradient_is_that_of_the_loss(fits, grid):
    logs = np.log(grid[0]), np.log(grid[1]), np.log(np.linspace(2, 4, len(grid[0])))
    theta = np.array([5.0, 6.0, 0.4, 0.3, 0.35])
    numeric = optimize.approx_fprime(theta, lambda x: fits.huber(x, *logs)[0], 1e-7)
    assert fits.huber(theta, *logs)[1] == pytest.approx(numeric, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_intervals_hold_the_truth_under_noise(fits, grid):
    true = fits.Law(1.7, 400.0, 410.0, 0.34, 0.28)
    losses = true.loss(*grid) * np.exp(np.random.default_rng(1).normal(0, 0.003, len(grid[0])))
    law = fits.parametric(*grid, losses, fits.STARTS[::9])
    several = fits.bootstrap(*grid, losses, law, 30)
    low, high = fits.interval(np.array([one.loss(3e7, 3e8) for one in several]))
    assert low - 0.02 <= true.loss(3e7, 3e8) <= high + 0.02 and 0 < high - low < 0.2


def test_a_parabola_finds_the_best_size_and_its_power(fits):
    budgets = np.array([1e12, 1e13, 1e14])
    n = np.geomspace(1e5, 1e7, 6)
    best = [fits.parabola(n, 2 + 0.1 * np.log(n / (0.3 * c**0.5)) ** 2).best for c in budgets]
    assert best == pytest.approx(0.3 * budgets**0.5)
    assert fits.power(budgets, np.array(best)) == pytest.approx((0.3, 0.5))
    assert fits.parabola(n, -(np.log(n) ** 2)).best is None


def test_each_rung_spends_its_budget(scaling):
    for scale in scaling.SCALES:
        rungs = scaling.ladder(scale)
        for rung in rungs:
            assert rung.flops == pytest.approx(rung.budget, rel=0.05)
        groups = {rung.budget for rung in rungs if not rung.held_out}
        assert all(sum(rung.budget == one for rung in rungs) >= 3 for one in groups)
        (largest,) = [rung for rung in rungs if rung.held_out]
        assert largest.budget > max(groups)


@pytest.mark.slow
def test_the_prediction_is_there_before_the_run_and_is_kept(scaling, fits, tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "STARTS", fits.STARTS[::9])
    true = fits.Law(1.7, 400.0, 410.0, 0.34, 0.28)
    rungs = scaling.ladder("cpu")
    runs = [one._asdict() | {"loss": float(true.loss(one.parameters, one.tokens))} for one in rungs if not one.held_out]
    (largest,) = [one for one in rungs if one.held_out]
    first = scaling.predicted(tmp_path, runs, largest, 3)
    assert first["loss"] == pytest.approx(true.loss(largest.parameters, largest.tokens), rel=0.01)
    assert json.loads((tmp_path / "prediction.json").read_text()) == first
    assert scaling.predicted(tmp_path, runs[:5], largest, 3) == first
