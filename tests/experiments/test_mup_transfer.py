"""What the experiment on transfer makes of its results; its runs are gptjax.training.population.population's."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "experiments" / "mup_transfer"))

import transfer


def test_best_rate_is_where_the_parabola_is_least():
    import math

    curve = [(rate, 1 + (math.log(rate) - math.log(0.003)) ** 2) for rate in (0.0005, 0.001, 0.002, 0.004, 0.008)]
    assert transfer.best_rate(curve) == pytest.approx(0.003)
    assert transfer.best_rate(curve[:2]) == 0.001  # at an end there is no parabola


def test_curves_leave_out_what_diverged_and_the_table_has_the_rest():
    rows = [
        {"parametrization": "mup", "width": 64, "rate": rate, "loss": loss}
        for rate, loss in ((0.004, None), (0.002, 2.0), (0.001, 2.5))
    ]
    assert transfer.curves(rows, "mup") == {64: [(0.001, 2.5), (0.002, 2.0)]}
    assert transfer.curves(rows, "standard") == {}
    assert "| mup | 64 | 0.002 | 2.000 |" in transfer.table(rows)


def test_config_of_a_width_adds_heads_and_keeps_their_width():
    config = transfer.config_of("mup", 128, 0.01, [])
    assert (config.model.heads, config.model.base_width, config.model.base_head_width) == (8, 64, 16)
