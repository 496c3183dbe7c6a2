"""What the torture bench calls equal: a run and its copy; and that it sees one byte of it that is not."""

import json
import shutil

import pytest
from conftest import ROOT


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "bench"))
    import torture

    return torture.compare


def test_one_byte_that_differs_is_seen(trained, tmp_path, compare):
    copy = shutil.copytree(trained, tmp_path / "copy")
    same = compare(trained, copy)
    # Parameters and two moments of AdamW, in float32, and a few counters.
    parameters = json.loads((trained / "summary.json").read_text())["parameters"]
    assert same["bytes_different"] == 0 and same["bytes_compared"] > 3 * 4 * parameters
    sample = (copy / "samples.txt").read_bytes()
    (copy / "samples.txt").write_bytes(bytes([sample[0] ^ 1]) + sample[1:])
    other = compare(trained, copy)
    assert other["bytes_different"] == 1 and other["differing"] == {"sample": 1}


def test_other_arrays_are_seen(trained, tmp_path, compare):
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "8")
    differing = compare(trained, copy)["differing"]
    assert any("params" in name for name in differing) and any("mu" in name for name in differing)
