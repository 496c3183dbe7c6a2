"""MFU by its convention, and null where the peak is not known."""

import numpy as np
import pytest

from gptjax.training import metrics


def test_flops_per_token_by_the_convention():
    params = {"positions": {"embedding": np.zeros((64, 8))}, "tokens": {"embedding": np.zeros((10, 8))}}
    assert metrics.flops_per_token(params, layers=2, width=8, context=64) == 6 * 80 + 12 * 2 * 8 * 64


def test_mfu_uses_the_longest_name_that_fits():
    assert metrics.mfu(1e5, 1e9, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(1e14 / 989e12)
    assert metrics.mfu(1e5, 1e9, "TPU v5 lite", 4) == pytest.approx(1e14 / (197e12 * 4))
    assert metrics.mfu(1e5, 1e9, "cpu", 1) is None
