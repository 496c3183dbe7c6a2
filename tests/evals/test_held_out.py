"""Held-out loss: the arithmetic of bits per byte, and the compressors beside it."""

import math
import shutil
import subprocess

import numpy as np
import pytest
from conftest import evaluate

from gptjax.config.errors import DataError
from gptjax.data import batches, token_sets
from gptjax.data.augment import Augment
from gptjax.data.layouts import sequential
from gptjax.data.tokenizers import tokenizers
from gptjax.evals import held_out


def test_a_uniform_model_needs_log2_v_bits_per_token():
    encoding = tokenizers.bpe_encoding(["to be or not to be"] * 9, 260)
    tokens = token_sets.from_texts(encoding, ["to be or not to be, that is"], "x")
    found = held_out.evaluate(
        lambda params, batch: {"loss": batch["weights_BT"].sum() * math.log(260)},
        None,
        list(batches.EvalBatches(sequential(tokens, 4, 0, Augment(), ""), 2)),
        "causal",
        tokenizers.token_bytes(encoding),
    )
    assert found["loss"] == pytest.approx(math.log(260)) and found["perplexity"] == pytest.approx(260)
    assert (found["tokens"], found["bytes"]) == (len(tokens) - 1, 27)
    assert found["bits_per_byte"] == pytest.approx((len(tokens) - 1) * math.log2(260) / 27)


def test_no_text_is_refused():
    with pytest.raises(DataError, match="empty"):
        held_out.evaluate(None, None, [], "causal", np.zeros(3))


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_compressors_are_the_command_lines(tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    text = ("def read(self):\n    return self.buffer\n" * 50 + "".join(map(str, range(3000)))).encode()
    theirs = subprocess.run([tool, "-9", "-c"], input=text, capture_output=True, check=True).stdout
    ours = held_out.compressors(text)[f"{tool}_bits_per_byte"]
    assert ours == pytest.approx(8 * len(theirs) / len(text), rel=0.005)  # file names and check sums differ


def test_the_command_prints_what_the_summary_says(trained, call):
    import json

    figures = json.loads(call(evaluate, f"--workdir={trained}", "--json").out)
    summary = json.loads((trained / "summary.json").read_text())
    assert figures["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_other_text_can_be_evaluated(trained, call, tmp_path):
    (tmp_path / "a.txt").write_text("the model reads text")
    (tmp_path / "b.txt").write_text("again")
    result = call(evaluate, f"--workdir={trained}", "--data", tmp_path / "a.txt", tmp_path / "b.txt")
    assert result.code == 0 and "over            27 tokens, 25 bytes" in result.out
