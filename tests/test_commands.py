"""Commands as a person meets them: bad input is one line and exit code 2, and nothing is written over."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, evaluate, generate, overrides, train


@pytest.mark.parametrize(
    "content, changes, expected",
    [
        (None, {}, "there is no file"),
        (b"", {}, "is empty: there is nothing to train on"),
        (b"\x89PNG\r\n\x1a\n\0\0", {}, "is not text: it has a zero byte at 8"),
        (b"caf\xe9", {}, "is not UTF-8 text: byte 0xe9 in line 1"),
        (b"x", {}, "is too short to hold out data.held_out=0.1 of it"),
        (b"short", {}, "the training text has 6 tokens, fewer than one window of 16 + 1"),
        (b"some text " * 50, {"data_tokenizer": "bert"}, "unknown tokenizer 'bert'; there are bytes, chars, bpe:N"),
        (b"some text " * 50, {"data_held_out": 0}, "data.held_out is 0.0; it must be more than 0"),
        (b"some text " * 50, {"model_vocabulary": 50}, "model.vocabulary=50 is smaller than the tokenizer's 257"),
        (b"some text " * 50, {"data_tokenizer": "chars"}, "the character '(' is not among the 7 of this tokenizer"),
        (b"some text " * 50, {"sample_temperature": -1}, "sample.temperature is -1.0; it cannot be negative"),
        (b"some text " * 50, {"model_layer": 4}, "unknown key model.layer; did you mean model.layers?"),
        (b"some text " * 50, {"data_batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
    ],
)
def test_train_refuses_bad_input_and_writes_nothing(tmp_path, call_train, content, changes, expected):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    message = call_train(tmp_path / "run", data_path=tmp_path / "input.txt", **changes).refusal()
    assert expected in message
    assert sorted(tmp_path.iterdir()) == before


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_directory_of_another_config_is_refused_with_the_keys_that_differ(trained, text_file, call_train):
    before = snapshot(trained)
    message = call_train(trained, data_path=text_file, model_layers=3, optimizer_learning_rate=0.5).refusal()
    assert "belongs to another config: model.layers (2 there, 3 here); optimizer.learning_rate (0.00" in message
    assert snapshot(trained) == before


def test_a_directory_that_is_no_run_is_refused(tmp_path, text_file, call_train):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "exists and is not a run" in call_train(tmp_path, data_path=text_file).refusal()
    assert "exists and is not a run" in call_train(tmp_path / "thesis.txt", data_path=text_file).refusal()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of the finished run in all of whose checkpoints the arrays are cut short."""
    workdir = shutil.copytree(trained, tmp_path / "damaged")
    for path in (workdir / "checkpoints").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return workdir


def test_a_truncated_checkpoint_is_refused_by_every_command(damaged, text_file, call, call_train):
    (damaged / "summary.json").unlink()
    before = snapshot(damaged)
    for result in (
        call_train(damaged, data_path=text_file),
        call(generate, f"--workdir={damaged}", "--prompt=x"),
        call(evaluate, f"--workdir={damaged}"),
    ):
        *progress, message = result.err.splitlines()
        assert result.code == 2 and "holds no usable checkpoint; damaged: 8: params/" in message
        assert not any("Traceback" in line for line in progress)
    assert snapshot(damaged) == before


@pytest.mark.slow
def test_from_a_damaged_checkpoint_every_command_goes_back_to_the_one_before(damaged, trained, text_file, call):
    shutil.rmtree(damaged / "checkpoints" / "4")
    shutil.copytree(trained / "checkpoints" / "4", damaged / "checkpoints" / "4")
    told = "checkpoint 8 is damaged (params/"
    older = call(evaluate, f"--workdir={trained}", "--step=4", "--json").out
    (damaged / "summary.json").unlink()
    result = call(evaluate, f"--workdir={damaged}", "--json")
    assert result.err.startswith(told) and result.out == older
    metrics = (damaged / "metrics.jsonl").read_text()
    result = call(train, f"--config={BASE}", f"--workdir={damaged}", *overrides(data_path=text_file))
    assert result.code == 0 and told in result.err and "resuming   at step 4" in result.err, result.err
    assert result.err.count("damaged (") == 1, "it is said once"
    again = [json.loads(line)["train/loss"] for line in (damaged / "metrics.jsonl").read_text().splitlines()]
    assert again == [json.loads(line)["train/loss"] for line in metrics.splitlines()]
    # What was trained anew is what there was; the damaged one is there still.
    figures = [call(evaluate, f"--workdir={workdir}", "--json").out for workdir in (damaged, trained)]
    assert figures[0] == figures[1] != older
    assert (damaged / "checkpoints" / "damaged-8").is_dir()


@pytest.mark.parametrize(
    "step, expected",
    [
        ("5", "holds no checkpoint of step 5; there are 4, 8"),
        ("worst", "'worst' is neither a step nor best"),
    ],
)
def test_a_step_that_is_not_there_is_refused(trained, call, step, expected):
    assert expected in call(evaluate, f"--workdir={trained}", f"--step={step}").refusal()


@pytest.mark.slow
def test_a_run_keeps_its_best_checkpoint_and_commands_read_it_where_asked_for(tmp_path, text_file, call, call_train):
    changes = dict(checkpoint_every_steps=0, checkpoint_keep=1, checkpoint_keep_best=1, eval_every_steps=2)
    changes |= dict(train_steps=10, optimizer_learning_rate=30.0, schedule_warmup_steps=10)  # it soon gets worse
    assert call_train(tmp_path / "run", data_path=text_file, **changes).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "val/loss" in line), key=lambda line: line["val/loss"])["step"]
    steps = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert best < 10 and steps == {best, 10}
    read = [call(evaluate, f"--workdir={tmp_path / 'run'}", "--json", *flags).out for flags in ((), ("--step=best",))]
    last, least = (json.loads(figures)["loss"] for figures in read)
    assert least < last


@pytest.mark.slow
def test_text_that_changed_is_noticed(tmp_path, text_file, call, call_train):
    copy = tmp_path / "text.txt"
    copy.write_text(text_file.read_text())
    assert call_train(tmp_path / "run", data_path=copy).code == 0
    copy.write_text(copy.read_text().replace("model", "MODEL"))
    assert "has changed since" in call(evaluate, f"--workdir={tmp_path / 'run'}").refusal()
    (tmp_path / "run" / "summary.json").unlink()
    assert "has changed since" in call_train(tmp_path / "run", data_path=copy).refusal()


@pytest.mark.parametrize("command", [generate, evaluate])
def test_a_workdir_that_is_no_run_is_refused(tmp_path, call, command):
    assert "is not a run: it has no config.json" in call(command, f"--workdir={tmp_path}").refusal()


@pytest.mark.parametrize(
    "command, flags, expected",
    [
        (train, [], "the following arguments are required: --config"),
        (train, ["--config=configs/nano.py"], "there is no recipe configs/nano.py"),
        (train, [f"--config={BASE}", "--wrkdir=x"], "unknown flag --wrkdir=x"),
        (generate, ["--workdir=x", "--temperature=hot"], "invalid float value: 'hot'"),
        (generate, ["--workdir=x", "--samples=0"], "samples is 0; it must be at least 1"),
        (generate, ["--workdir=x", "--topk=1"], "unrecognized arguments: --topk=1"),
    ],
)
def test_wrong_flags_are_one_line(call, command, flags, expected):
    assert expected in call(command, *flags).refusal()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--prompt=" + "x" * 17], "the prompt has 17 tokens, and the model's context is 16"),
        (["--temperature=-1"], "temperature is -1.0; it must be at least 0"),
        (["--max_tokens=0"], "max_tokens is 0; it must be at least 1"),
    ],
)
def test_generate_refuses_what_cannot_be(trained, call, flags, expected):
    assert expected in call(generate, f"--workdir={trained}", "--json", *flags).refusal()


@pytest.mark.parametrize("content, expected", [(None, "cannot read"), (b"", "is empty"), (b"\0", "zero byte at 0")])
def test_evaluate_refuses_files_it_cannot_use(trained, call, tmp_path, content, expected):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    assert expected in call(evaluate, f"--workdir={trained}", "--data", path).refusal()


def test_help_costs_nothing_and_names_every_flag():
    script = "import sys, runpy; sys.argv = ['x', '--help']; "
    script += "import gptjax.{0}, gptjax.core.arguments as c\ntry: c.run(gptjax.{0}.main)\nexcept SystemExit: pass\n"
    script += "assert 'jax' not in sys.modules"
    for name in ("train", "generate", "evaluate", "convert", "plan"):
        done = subprocess.run(
            [sys.executable, "-c", script.format(name)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "--json" in done.stdout, done.stderr


def test_importing_gptjax_imports_nothing_heavy():
    script = "import sys, gptjax; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == "[]"
