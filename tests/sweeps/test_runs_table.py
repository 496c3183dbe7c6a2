"""Tables of runs: cumulative costs, groups, comparability, and significance tests."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import tiny_config

import gptjax
from gptjax.config.errors import CheckpointError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.runs import directory as workdirs
from gptjax.sweeps import runs_table
from gptjax.training.monitoring import metrics


@pytest.fixture
def copies(trained, tmp_path):
    """`copies(name, val_loss, **keys)`: a copy of the tiny run with another config and result."""

    def made(name, val_loss=2.0, **keys):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        config = json.loads((tmp_path / name / "config.json").read_text())
        for key, value in keys.items():
            section, _, last = key.partition("_")
            (config if key == "seed" else config[section])["seed" if key == "seed" else last] = value
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        summary = json.loads((tmp_path / name / "summary.json").read_text()) | {"val_loss": val_loss}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        return tmp_path / name

    return made


def test_a_table_has_the_lines_with_cumulative_costs(trained):
    table, run = runs_table.read(trained), gptjax.load(trained)
    assert list(table.columns["step"]) == [2, 4, 6, 8]
    assert list(table.columns["tokens"]) == [2 * 64, 4 * 64, 6 * 64, 8 * 64]
    each = metrics.flops_per_token(run.params, run.config.model, 16)
    assert table.columns["flops"] == pytest.approx(each * table.columns["tokens"])
    assert list(table.has_measure("loss")) == [False, True, False, True]
    assert table.final_value("loss") == json.loads((trained / "summary.json").read_text())["val_loss"]


def test_norms_are_found_by_group(tmp_path):
    lines = [
        {"step": 1, "train/loss": 2.0},
        {
            "step": 2,
            "statistics/block_0/mlp/ratio": 0.5,
            "statistics/tokens/ratio": 0.25,
            "statistics/tokens/updates": 1,
        },
        {"step": 4, "statistics/block_0/mlp/ratio": None, "statistics/tokens/ratio": 0.125},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs_table.norms(tmp_path, "ratio")
    assert {group: (*steps, *values[:1]) for group, (steps, values) in found.items()} == {
        "block_0/mlp": (2, 4, 0.5),
        "tokens": (2, 4, 0.25),
    }
    assert math.isnan(found["block_0/mlp"][1][1]) and runs_table.norms(tmp_path, "parameters") == {}


def test_stages_count_with_their_own_batches(text_file):
    config = tiny_config(data_path=text_file, data_stages="((3, 8, 4),)")
    counted = runs_table.tokens_until(config, np.array([2, 3, 5]))
    assert counted.tolist() == [[64, 0], [96, 0], [96, 128]]


def test_runs_that_differ_in_seed_alone_are_a_group(copies):
    paths = [copies("a"), copies("b", seed=1), copies("c", optimizer_learning_rate=0.5), copies("d", log_every_steps=7)]
    groups = runs_table.group_runs([runs_table.read(path) for path in paths])
    assert [[run.workdir.name for run in group.runs] for group in groups] == [["a", "b", "d"], ["c"]]
    assert [group.name for group in groups] == ["learning_rate=0.006", "learning_rate=0.5"]
    assert runs_table.config_differences([group.runs[0] for group in groups]) == {
        "optimizer.learning_rate": [0.006, 0.5]
    }


def test_welch_against_its_formula(copies):
    values = {0.1: [2.0, 2.1, 2.3], 0.2: [2.6, 2.9]}
    paths = [
        copies(f"{rate}-{seed}", value, seed=seed, optimizer_learning_rate=rate)
        for rate, own in values.items()
        for seed, value in enumerate(own)
    ]
    (found,) = runs_table.welch(runs_table.group_runs([runs_table.read(path) for path in paths]), "loss")
    one, two = map(np.array, values.values())
    spread = [own.var(ddof=1) / len(own) for own in (one, two)]
    t = (one.mean() - two.mean()) / math.sqrt(sum(spread))
    freedom = sum(spread) ** 2 / sum(s**2 / (len(own) - 1) for s, own in zip(spread, (one, two), strict=True))
    drawn = np.random.default_rng(0).standard_t(freedom, 1_000_000)
    assert found.difference == pytest.approx(one.mean() - two.mean())
    assert found.p == pytest.approx((abs(drawn) > abs(t)).mean(), rel=0.02)


def test_one_run_per_group_gives_no_p_value(copies):
    groups = runs_table.group_runs(
        [runs_table.read(copies("a")), runs_table.read(copies("b", 1.0, optimizer_learning_rate=0.5))]
    )
    assert [one.p for one in runs_table.welch(groups, "loss")] == [None]


def test_other_tokenizers_leave_bits_per_byte(copies):
    first, second = copies("a"), copies("b")
    assert runs_table.comparable([runs_table.read(first), runs_table.read(second)]) == "loss"
    shutil.rmtree(second / "tokenizer")
    tokenizers.save(tokenizers.chars_encoding(["abc"]), second / "tokenizer")
    assert runs_table.comparable([runs_table.read(first), runs_table.read(second)]) == "bits_per_byte"


def test_runs_that_are_not_comparable_are_refused(copies, tmp_path):
    first, other = runs_table.read(copies("a")), copies("b")
    with pytest.raises(DataError, match="one run"):
        runs_table.comparable([first])
    facts = workdirs.read_data_facts(other)
    workdirs.write_data_facts(other, facts | {"fingerprints": {"text": "another"}})
    with pytest.raises(DataError, match="different text"):
        runs_table.comparable([first, runs_table.read(other)])
    with pytest.raises(DataError, match="objectives are causal and fim"):
        runs_table.comparable([first, runs_table.read(copies("c", train_objective="fim"))])
    (other / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="no metrics"):
        runs_table.read(other)
    with pytest.raises(CheckpointError, match="is not a run"):
        runs_table.read(tmp_path / "nothing")
