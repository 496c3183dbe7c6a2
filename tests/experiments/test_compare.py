"""The command that compares runs writes one page that needs nothing else, prints objects, and overwrites nothing."""

import importlib.util
import json
import re
import shutil

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def compare():
    found = importlib.util.spec_from_file_location("compare", ROOT / "experiments" / "compare.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def pair(trained, tmp_path):
    """The tiny run, and the same as if its learning rate had been <another>."""
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((other / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    return trained, other


def test_one_page_with_picture_and_differences(compare, pair, tmp_path, call):
    out = tmp_path / "out"
    for _ in range(2):  # its own page may be made again
        done = call(compare, *pair, f"--out={out}")
        assert done.code == 0, done.err
    page = (out / "compare.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "optimizer.learning_rate" in page and "optimizer.beta1" not in page
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "two finished runs of each" in done.out


def test_objects_alone_are_printed(compare, pair, tmp_path, call):
    done = call(compare, *pair, f"--out={tmp_path / 'out'}", "--json")
    first, second, both = map(json.loads, done.out.splitlines())
    assert [one["config"] for one in (first, second)] == [{"optimizer.learning_rate": rate} for rate in (0.006, 0.5)]
    assert first["ends"] == second["ends"] == [json.loads((pair[0] / "summary.json").read_text())["val_loss"]]
    assert both["difference"] == 0 and both["p"] is None and both["significant"] is None


def test_what_cannot_be_is_one_line_and_writes_nothing(compare, pair, tmp_path, call):
    out = tmp_path / "out"
    assert "is not a run" in call(compare, pair[0], tmp_path / "nothing", f"--out={out}").refusal()
    assert "give two or more" in call(compare, pair[0], f"--out={out}").refusal()
    assert not out.exists()
    assert "give another --out" in call(compare, *pair, f"--out={pair[1]}").refusal()
    assert not (pair[1] / "compare.png").exists()


def test_names_are_text_on_the_page(compare):
    page = compare.as_html({"A & B": [["key", "<i>"], ["x", "<script>"]]}, b"")
    assert "<script>" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
