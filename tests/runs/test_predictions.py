"""Task heads learn what can be learnt from examples, on every kind of model, and say it in words."""

import json

import numpy as np
import pytest
from conftest import BASE, evaluate, overrides, tiny_config, train

import gptjax
from gptjax.config.errors import ConfigError
from gptjax.runs import predictions
from gptjax.training import loop

COLOURS = ["red", "blue"]


def records(form):
    """Tasks that a look at the letters solves."""
    rng, found = np.random.default_rng(0), []
    for i in range(120):
        words = [str(word) for word in rng.choice(["the", "a", "car", "on"], 3)]
        colour, at = COLOURS[i % 2], int(rng.integers(4))
        text = " ".join([*words[:at], colour, *words[at:]])
        own = {
            "classes": {"text": text, "label": colour},
            "values": {"text": text, "label": 1.0 if colour == "red" else -1.0},
            "choices": {
                "text": " ".join(words),
                "choices": ["xx", "zz"][:: 1 if i % 2 else -1],
                "label": 0 if i % 2 else 1,
            },
            "tags": {"text": text.split(), "label": ["C" if word in COLOURS else "O" for word in text.split()]},
            "spans": {"text": text, "span": colour, "label": text.index(colour)},
        }
        found.append(own[form])
    return found


TASKS = {"classes": "classification", "values": "regression", "choices": "choice", "tags": "tagging", "spans": "span"}
CASES = [
    ("gpt", "classes"), ("encoder", "tags"), ("gpt", "spans"), ("gpt", "values"), ("gpt", "choices"),
    ("seq2seq", "classes"), ("recurrent", "classes"), ("encoder", "classes"),
]  # fmt: skip


def flags(folder, arch, form, **more):
    labels = {"classes": "('red', 'blue')", "tags": "('O', 'C')"}
    changes = dict(
        data_path=folder, data_layout="examples", model_arch=arch, model_task=TASKS[form],
        train_objective=TASKS[form],
        model_width=32, model_context=32, model_pooling="mean", train_steps=200, eval_every_steps=200,
        data_batch_size=16, checkpoint_every_steps=200, log_every_steps=50, optimizer_learning_rate=5e-3,
        eval_batches=10,
    )  # fmt: skip
    of_examples = {"form": form, "labels": labels.get(form, "()")}
    if form == "spans":
        of_examples |= {"template": "?", "second": "{text}", "answer": "{span}"}
    own = [f"--config.data.examples.{key}={value}" for key, value in of_examples.items()]
    return [*overrides(**changes | more), *own]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "form"), CASES)
def test_heads_learn_from_examples_and_predict(arch, form, tmp_path, call):
    found = records(form)
    for split, own in (("train", found[:96]), ("val", found[96:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found[96:104]))
    workdir = tmp_path / "run"
    result = call(train, f"--config={BASE}", f"--workdir={workdir}", *flags(tmp_path, arch, form))
    assert result.code == 0, result.err
    figures = json.loads(call(evaluate, f"--workdir={workdir}", "--test=test", "--json").out)
    if form == "values":
        assert figures["loss"] < 0.1
    else:
        assert figures["accuracy"] >= 0.95 > figures.get("majority_accuracy", 0) or form == "tags"
    predicted = gptjax.load(workdir).predict(
        [{key: value for key, value in one.items() if key != "label"} for one in found[96:]]
    )
    right = {
        "classes": lambda one, given: one["label"] == given["label"] and one["probability"] > 0.5,
        "values": lambda one, given: abs(one["value"] - given["label"]) < 0.5,
        "choices": lambda one, given: one["choice"] == given["label"],
        "tags": lambda one, given: one["labels"] == given["label"],
        "spans": lambda one, given: one["text"] == given["span"],
    }[form]
    assert sum(map(right, predicted, found[96:])) >= 20  # of 24
    lines = call(evaluate, f"--workdir={workdir}", f"--predict={tmp_path / 'test.jsonl'}").out.splitlines()
    assert [json.loads(line) for line in lines] == predicted[:8]
    sample = (workdir / "samples.txt").read_text().splitlines()
    assert len(sample) == 5 and ("right: " in sample[0]) == (form in ("classes", "values", "choices"))


def test_probabilities_are_the_heads_and_a_span_does_not_end_before_it_begins():
    class config:
        class model:
            task = "span"

        class data:
            class examples:
                labels = ()

    from gptjax.data.tokenizers import tokenizers

    answer = np.zeros((1, 4, 2), "f")
    answer[0, 2, 0], answer[0, 0, 1], answer[0, 3, 1] = 9, 9, 5  # the best end comes before the best start
    batch = {"inputs_BT": np.array([list(b"abcd")]), "segments_BT": np.array([[1, 1, 1, 1]])}
    (found,) = predictions.to_predictions(answer, batch, config, tokenizers.bytes_encoding())
    starts, ends = (np.exp(answer[0, :, i]) / np.exp(answer[0, :, i]).sum() for i in (0, 1))
    best = max((starts[i] * ends[j], i, j) for i in range(4) for j in range(i, 4))
    assert found["text"] == "abcd"[best[1] : best[2] + 1] and found["probability"] == pytest.approx(best[0], rel=1e-5)
    padded = batch | {"segments_BT": np.array([[1, 1, 0, 0]])}
    assert predictions.to_predictions(answer, padded, config, tokenizers.bytes_encoding())[0]["text"] in (
        "a",
        "b",
        "ab",
    )


def test_a_run_without_a_head_predicts_nothing(trained, tmp_path, call):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="was not trained on examples with answers"):
        gptjax.load(trained).predict([{"text": "a"}])
    assert (
        "was not trained on examples"
        in call(evaluate, f"--workdir={trained}", f"--predict={tmp_path / 'a.jsonl'}").refusal()
    )
    assert "have splits; leave --test out" in call(evaluate, f"--workdir={trained}", "--test=test").refusal()


@pytest.mark.slow
def test_a_run_that_learns_dialogues_has_their_template(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    config = tiny_config(data_path=tmp_path, data_layout="packed", model_context=64, train_steps=2, sample_prompt="a")
    with config.unlocked():
        config.data.examples.form = "chat"
    loop.train(config, tmp_path / "run")
    from gptjax.runs import chat

    run = gptjax.load(tmp_path / "run")
    template = chat.load_template(tmp_path / "run")
    text = run.tokenizer.decode(chat.prompt_ids(template, turns[:1], run.tokenizer))
    assert (
        text == "<|endoftext|>User: hi\nAssistant:" and chat.stop_strings(template, run.tokenizer)[0] == "<|endoftext|>"
    )
