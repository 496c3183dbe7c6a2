"""Switches of a run, every two values of two of them together: each run resumes exactly and writes text."""

import json
import subprocess
import sys

import pytest
import switches
from conftest import ROOT

ROWS = json.loads((ROOT / "tests" / "golden" / "switches.json").read_text())
QUICK = (0, 10, 20)
CASES = [pytest.param(row, id=str(i), marks=[pytest.mark.slow] * (i not in QUICK)) for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def ask():
    """`ask("train", row)` of a process with two devices."""
    command = [sys.executable, "tests/switches.py"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def asked(*request):
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield asked
        process.stdin.close()


@pytest.mark.parametrize("row", CASES)
def test_a_choice_trains_and_resumes_exactly(ask, row):
    assert ask("train", row) == ""


def test_pairs_that_never_meet_are_refused_in_one_line(ask):
    met = set().union(*map(switches.pairs_of, ROWS))
    apart = [pair for pair in switches.every_pair() if pair not in met]
    assert len(apart) < len(met) / 100
    for pair in apart:
        line = ask("refuse", dict(pair))
        assert line and "\n" not in line, (pair, line)
