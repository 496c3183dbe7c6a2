"""Evaluation of generated answers: prompts shortened as in training, ROUGE, and the baseline of first sentences."""

import json

import pytest
from conftest import BASE, evaluate, overrides

import gptjax
from gptjax.data import examples
from gptjax.evals import writing

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the summaries extra is not installed")


@pytest.fixture(scope="module")
def writes(tmp_path_factory):
    """A run trained to answer with the colour in a text, and its folder of examples."""
    from gptjax import config as configs
    from gptjax.training import loop

    folder = tmp_path_factory.mktemp("writes")
    records = [
        {"text": f"{'x ' * (i % 9)}{colour}. So. It. Is.", "label": f"is {colour}"}
        for i in range(16)
        for colour in ("red", "blue")
    ]
    for split, own in (("train", records), ("val", [*records[::5], {"text": "red " * 60, "label": "is red"}])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    changes = dict(
        data_path=folder, data_layout="examples", model_context=64, model_width=32, train_steps=150,
        eval_every_steps=150, data_batch_size=16, optimizer_learning_rate=1e-2,
        checkpoint_every_steps=150, model_positions="rotary",
    )  # fmt: skip
    flags = [*overrides(**changes), "--config.data.examples.form=text", "--config.data.examples.template={text}|"]
    loop.train(configs.read(BASE, flags), folder / "run")
    return folder


@pytest.mark.slow
def test_answers_and_their_scores(writes, call):
    result = call(evaluate, f"--workdir={writes / 'run'}", "--rouge", "--json")
    figures = json.loads(result.out)
    lines = [json.loads(line) for line in (writes / "run" / "written_val.jsonl").read_text().splitlines()]
    right = [json.loads(line)["label"] for line in (writes / "val.jsonl").read_text().splitlines()]
    assert [line["right"] for line in lines] == right and figures["examples"] == len(right) == 8
    assert sum(line["written"] == line["right"] for line in lines) >= 6
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score(line["right"], line["written"])["rougeL"].fmeasure for line in lines]
    assert figures["rougeL"] == pytest.approx(100 * sum(each) / len(each))
    assert 0 < figures["lead3_rouge1"] < figures["rouge1"]
    assert "first sentences" in call(evaluate, f"--workdir={writes / 'run'}", "--rouge").out


@pytest.mark.slow
def test_prompts_are_shortened_within_the_template(writes):
    run = gptjax.load(writes / "run")
    record = examples.read(run.config.data, "val")[-1]
    ids = writing.prompt_ids(record, run.config.data.examples, run.tokenizer, 31)
    assert run.tokenizer.decode(ids) == ("red " * 60)[:30] + "|"


def test_first_sentences():
    assert writing.lead_sentences("One. Two!  Three?\nFour. Five.") == "One. Two! Three?"
    assert writing.lead_sentences("no end") == "no end"


def test_runs_without_written_answers_are_refused(trained, call):
    assert "was not trained to write answers" in call(evaluate, f"--workdir={trained}", "--rouge").refusal()
