"""Switches of a run, every two values of two of them together: each run resumes exactly and writes text."""

import json
import subprocess
import sys

import pytest
import switches
from conftest import BASE, ROOT

from gptjax import config as configs
from gptjax.training.setup import CHOICES

ROWS = json.loads((ROOT / "tests" / "golden" / "switches.json").read_text())
CASES = [pytest.param(array, row, id=f"{array}-{i}") for array, rows in ROWS.items() for i, row in enumerate(rows)]
# Choices that other tests make: of texts, of where figures go, of platforms, of a text's vectors, of rows of two tasks.
ELSEWHERE = {
    "data.source": ("text",),
    "log.writers": ("jsonl", "tensorboard", "wandb"),
    "model.pooling": ("first", "pooler"),
    "finetune.method": ("prompt",),
    "model.kernels": ("cpu", "gpu", "tpu"),
    "data.examples.form": ("chat", "instructions", "text"),
    "train.objective": ("seq2seq", "next_sentence"),
}


@pytest.fixture(scope="module")
def ask():
    """`ask("train", array, row)` of a process with two devices."""
    command = [sys.executable, "tests/switches.py"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def asked(*request):
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield asked
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize(("array", "row"), CASES)
def test_a_choice_trains_and_resumes_exactly(ask, array, row):
    assert ask("train", array, row) == ""


@pytest.mark.slow
@pytest.mark.parametrize("array", ROWS)
def test_pairs_that_never_meet_are_refused_in_one_line(ask, array):
    met = set().union(*map(switches.pairs_of, ROWS[array]))
    apart = [pair for pair in switches.every_pair(array) if pair not in met]
    assert len(apart) < len(met) / 80
    for pair in apart:
        line = ask("refuse", array, dict(pair))
        assert line and "\n" not in line, (pair, line)


@pytest.mark.parametrize("array", ROWS)
def test_the_rows_have_every_value_of_every_switch(array):
    for name, values in switches.ARRAYS[array].items():
        assert {row[name] for row in ROWS[array]} == set(values), name


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_of_a_config_is_a_switch(key):
    chosen = {configs.flatten(configs.read(BASE)).get(key), *ELSEWHERE.get(key, ())}
    for array in switches.ARRAYS.values():
        chosen |= {keys[key] for values in array.values() for keys in values.values() if key in keys}
    chosen |= {cell for cell in switches.SWITCHES["cell"] if key in ("model.encoder", "model.decoder")}  # see keys_of
    assert set(CHOICES[key]) <= chosen
