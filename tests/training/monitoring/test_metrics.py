"""MFU by its convention, and null if the peak is unknown."""

import json

import numpy as np
import pytest
from conftest import tiny_config

from gptjax.training import loop
from gptjax.training.monitoring import metrics


def test_flops_per_token_by_the_convention():
    params = {"positions": {"embedding": np.zeros((64, 8))}, "tokens": {"embedding": np.zeros((10, 8))}}
    config = tiny_config(model_width=8).model
    assert metrics.flops_per_token(params, config, context=64) == 6 * 80 + 12 * 2 * 8 * 64


def test_flops_of_a_mixture_count_the_experts_of_one_token():
    one = {"block_0": {"mlp": {"up": {"kernel": np.zeros((16, 64))}, "router": {"kernel": np.zeros((16, 8))}}}}
    eight = {"block_0": {"mlp": one["block_0"]["mlp"] | {"up": {"kernel": np.zeros((8, 16, 64))}}}}
    config = tiny_config(model_mlp="experts", model_experts=8, model_experts_per_token=2).model
    difference = metrics.flops_per_token(eight, config, 16) - 6 * (2 * 16 * 64 + 16 * 8)
    assert difference == 12 * 2 * 16 * 16


def test_mfu_uses_the_longest_name_that_fits():
    assert metrics.mfu(1e5, 1e9, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(1e14 / 989e12)
    assert metrics.mfu(1e5, 1e9, "TPU v5 lite", 4) == pytest.approx(1e14 / (197e12 * 4))
    assert metrics.mfu(1e5, 1e9, "cpu", 1) is None


def test_a_name_fits_by_whole_words():
    assert metrics.peak_flops("NVIDIA L40S") == 362e12 != metrics.peak_flops("NVIDIA L4")
    assert metrics.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert metrics.peak_flops("NVIDIA H100 PCIe") < metrics.peak_flops("NVIDIA H100 80GB HBM3")
    assert metrics.peak_flops("NVIDIA L400") is None


@pytest.mark.slow
def test_a_known_peak_is_reported_with_its_convention(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e12)
    loop.train(tiny_config(data_path=text_file), tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    embeddings = 257 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 64) + 5 * 16
    expected = line["tokens_per_second"] * (6 * embeddings + 12 * 2 * 16 * 16) / 1e12
    assert line["mfu"] == pytest.approx(expected) and metrics.MFU_CONVENTION in capsys.readouterr().err
