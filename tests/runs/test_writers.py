"""Writers: TensorBoard, Weights & Biases, and metrics.jsonl after a crash."""

import json

import pytest
from conftest import tiny_config

from gptjax.config.errors import ConfigError
from gptjax.runs import writers
from gptjax.training import loop


def test_lines_after_the_checkpoint_and_half_a_line_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    (writer,) = writers.open_writers(("jsonl",), tmp_path, {}, 2)
    writer.write({"step": 3, "train/loss": 0.5, "mfu": None})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "train/loss": 0.5, "mfu": None},
    ]


def test_tensorboard_gets_every_number(tmp_path, text_file):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    loop.train(tiny_config(data_path=text_file, log_writers="('tensorboard',)"), tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    raw = events.read_bytes()
    for name in (b"train/loss", b"val/bits_per_byte", b"learning_rate"):
        assert name in raw
    assert b"mfu" not in raw, "what is not known is not written"


def test_wandb_offline_keeps_a_run_on_disk(tmp_path, text_file, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loop.train(tiny_config(data_path=text_file, log_writers="('wandb',)"), tmp_path / "run")
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    assert b"val/bits_per_byte" in record.read_bytes()


@pytest.mark.parametrize("name, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_says_how_to_get_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'gptjax\[{name}\]'"):
        writers.open_writers((name,), tmp_path, {}, 0)
