"""The experiments on tasks: their tables, what they run, and that what is there is not run again."""

import json
import sys

import pytest
from conftest import ROOT, tiny_config

sys.path.append(str(ROOT / "experiments" / "finetune"))

import dialogues
import ranks
import tasks

ROWS = [
    {"way": "lora", "seed": 0, "score": 0.8, "minutes": 2.0, "trained": 1000},
    {"way": "words", "seed": 0, "score": 0.75, "minutes": 0.1, "trained": 20},
    {"way": "lora", "seed": 1, "score": 0.9, "minutes": 4.0, "trained": 1000},
]


def test_a_table_has_means_and_deviations_in_the_tasks_order():
    lines = tasks.table(ROWS, tasks.TASKS["sst2"]).splitlines()
    assert lines[2:] == [
        "| words | 75.00 |  | 75.00 | 0.1 | 20 |",
        "| lora | 85.00 | 7.07 | 80.00, 90.00 | 3.0 | 1,000 |",
    ]


def test_a_dialogue_is_two_speakers_in_turn_and_ends_with_an_answer():
    line = "Hi ! __eou__ Hello . __eou__ Bye ? __eou__"
    assert dialogues.messages(line) == [
        {"role": "user", "content": "Hi !"},
        {"role": "assistant", "content": "Hello ."},
    ]
    assert dialogues.messages("Alone . __eou__") == []


@pytest.mark.slow
def test_ways_are_run_once_and_drawn_again(trained, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    records = [f"film {i} is {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(60)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(records) + "\n")
    keys = {"data.path": tmp_path, "data.context": 16, "data.batch_size": 4, "train.steps": 3, "eval.batches": 2}
    own = ["sst2", f"--base={trained}", "--ways=words,scratch,lora", "--seeds=0,1", f"--runs={tmp_path / 'runs'}"]
    flags = [*own, f"--out={tmp_path / 'out'}", *(f"--config.{key}={value}" for key, value in keys.items())]
    monkeypatch.setattr("sys.argv", ["tasks.py", *flags])
    tasks.main()
    rows = json.loads((tmp_path / "out" / "sst2.json").read_text())
    assert sorted((row["way"], row["seed"]) for row in rows) == [
        ("lora", 0), ("lora", 1), ("scratch", 0), ("scratch", 1), ("words", 0),
    ]  # fmt: skip
    assert all(0 <= row["score"] <= 1 and row["trained"] > 0 for row in rows)
    assert (tmp_path / "out" / "sst2.png").stat().st_size > 5000
    monkeypatch.setattr(tasks, "said", None)  # nothing is run again
    tasks.main()
    monkeypatch.setattr("sys.argv", ["tasks.py", *flags, "--redraw"])
    tasks.main()
    assert capsys.readouterr().out.count("| lora |") == 3


@pytest.mark.slow
def test_ranks_of_a_run_meet_its_schedule(trained, tmp_path, text_file):
    from gptjax.training import loop

    config = tiny_config(data_path=text_file, finetune_method="adalora", finetune_rank=1, train_steps=8)
    with config.unlocked():
        config.init_from = str(trained)
        config.checkpoint.keep_every = 1
        config.finetune.adalora.update(first_rank=3, warmup_steps=2, final_steps=2, every_steps=1)
    loop.train(config, tmp_path / "run")
    facts = ranks.read(tmp_path / "run")
    for step, count, chosen in facts["checkpoints"]:
        assert not chosen or count == facts["schedule"][step]
    assert sum(facts["ranks"].values()) == facts["schedule"][-1] == len(facts["ranks"])
    ranks.plot(facts, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5000
