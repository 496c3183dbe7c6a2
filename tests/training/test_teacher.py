"""Distillation runs: a student with a teacher, and invalid teachers."""

import json

import pytest
from conftest import tiny_config

from gptjax.training import loop


@pytest.mark.slow
def test_a_student_learns_from_a_finished_run(call_train, trained, tmp_path, text_file):
    flags = {"data_path": text_file, "train_objective": "distillation", "objective_teacher": trained}
    result = call_train(tmp_path / "student", model_width=8, model_heads=1, **flags)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/divergence"] > 0 for line in lines)
    assert {"val/loss", "val/divergence"} & lines[-1].keys() == {"val/loss"}, "held-out text is the student's own"


def test_a_student_of_its_own_teacher_has_nothing_to_learn(trained, tmp_path, text_file):
    """With the teacher's parameters and teacher_share 1, divergence and gradient are 0."""
    flags = {"data_path": text_file, "train_objective": "distillation", "objective_teacher": trained}
    config = tiny_config(objective_teacher_share=1.0, train_steps=2, log_every_steps=1, **flags)
    with config.unlocked():
        config.init_from = str(trained)
    loop.train(config, tmp_path / "student")
    line = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(line["train/divergence"]) < 1e-6 and line["grad_norm"] < 1e-4


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data_tokenizer": "chars", "sample_prompt": "the"}, "has another tokenizer"),
        ({"model_vocabulary": 300}, "is a decoder of 257 tokens, and this run a decoder of 300"),
        ({"objective_teacher": "", "train_steps": 3}, "needs a teacher"),
        ({"objective_teacher_share": 1.5}, "at most 1"),
        ({"model_context": 32, "data_context": 32}, "reads 16 tokens"),
    ],
)
def test_invalid_teachers_are_refused(call_train, trained, tmp_path, text_file, changes, told):
    flags = {"data_path": text_file, "train_objective": "distillation", "objective_teacher": trained} | changes
    assert told in call_train(tmp_path / "student", **flags).refusal()
    assert not (tmp_path / "student").exists()
