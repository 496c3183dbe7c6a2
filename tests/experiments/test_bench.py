"""The bench of a train step does what it says, on a tiny shape beside a peer of the test's own; never how fast."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PEER = """
import json, sys
print("a line that is not the result")
print(json.dumps({"impl": "pretended", "tokens_per_second": 50.0, "ms_median": 2.0, "argv": sys.argv[1:]}))
"""


def bench(*flags):
    command = [sys.executable, str(ROOT / "experiments/bench/train_step.py"), "--shape=tiny", "--steps=2", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    peer = tmp_path_factory.mktemp("peer") / "peer.py"
    peer.write_text(PEER)
    done = bench("--json", "--rounds=3", f"--peer={peer}", "--set", "train.dtype=bfloat16", "--beside")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_the_ratio_is_the_median_of_the_rounds(result):
    rates = result["rounds"]["ours"]
    assert len(rates) == 3 and result["ratio"] == pytest.approx(sorted(rates)[1] / 50)
    assert result["ratios"]["peer"] == result["ratio"] and result["ratios"]["beside"] > 0


def test_every_figure_is_there(result):
    ours = result["sides"]["ours"]
    shape = result["shape"]
    # 6N + 12 L D T of the tiny shape: 12 D^2 for a layer's matrices, its norms, the table.
    D = shape["width"]
    count = 12 * D * D + 3 * D + shape["vocab"] * D
    assert ours["flops_per_token"] == 6 * count + 12 * D * shape["context"]
    assert ours["flops_per_second"] == pytest.approx(ours["tokens_per_second"] * ours["flops_per_token"], rel=0.5)
    assert ours["peak_bytes"] > 2**20 and ours["compile_seconds"] > 0 and ours["step_temporary_bytes"] > 0
    assert ours["attention"] and "6N" in ours["mfu_convention"]
    assert {"machine", "versions", "date", "command", "memory_ratios"} <= result.keys()


def test_our_side_that_cannot_be_says_why():
    done = bench("--peer=none", "--set", "model.layer=3")
    assert done.returncode != 0
    assert "did you mean model.layers?" in done.stderr


@pytest.mark.slow
def test_decoding_is_timed_without_compiling(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    command = [
        sys.executable,
        str(ROOT / "experiments/bench/decode.py"),
        "--shape=tiny",
        "--batch=3",
        "--new_tokens=20",
    ]
    command += ["--rounds=2", "--steps=1", "--json", f"--peer={peer}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["recompilations"] == 0 and found["gigabytes_per_second"] > 0 and found["share_of_limit"] > 0
    rates = found["rounds"]["ours"]
    assert found["ratio"] == pytest.approx(sum(rates) / 2 / 50)
