"""Whole runs: their files, resuming, and bit-identical results after being killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import AS_USERS_RUN, BASE, ROOT, evaluate, overrides, shared, tiny_config
from training_processes import lines_of, params_of, reached, start

import gptjax
from gptjax.data import batches
from gptjax.optim import skip_step
from gptjax.runs import config as configs
from gptjax.runs.checkpoints import Checkpoints
from gptjax.training import loop
from gptjax.training.monitoring import goodput, metrics
from gptjax.training.population import population as populations
from gptjax.training.recorder import Recorder
from gptjax.training.setup import train_setup

FILES = {
    "config.json",
    "data.json",
    "metrics.jsonl",
    "checkpoints",
    "tokenizer",
    "loss.png",
    "samples.txt",
    "summary.json",
}
TIMES = {f"time/{kind}" for kind in goodput.KINDS}
SUMMARY = {
    "steps", "seconds", "tokens_per_second", "val_loss", "val_bits_per_byte", "gzip_bits_per_byte",
    "xz_bits_per_byte", "parameters", "goodput",
} | TIMES  # fmt: skip


def test_a_run_writes_all_its_files(trained):
    assert {p.name for p in trained.iterdir()} == FILES
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((trained / "summary.json").read_text())
    assert summary.keys() == SUMMARY and summary["steps"] == 8 and summary["val_loss"] < 5.6
    lines = lines_of(trained)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    always = {"step", "train/loss", "tokens_per_second", "mfu", "learning_rate", "grad_norm", "seconds", "data/wait_ms"}
    always.add("skipped_steps")
    for line in lines:
        held_out = {"val/loss", "val/bits_per_byte"} if line["step"] % 4 == 0 else set()
        assert line.keys() == always | held_out | TIMES
        assert line["mfu"] is None, "nobody knows a CPU's peak"
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


@pytest.mark.slow
def test_experts_train_scanned_with_dropout_and_accumulation_and_log_their_routing(tmp_path, text_file):
    config = tiny_config(
        data_path=text_file, model_mlp="experts", model_experts=4, model_scan_layers=True, model_remat="full",
        model_dropout=0.1, train_grad_accumulation=2,
    )  # fmt: skip
    summary = loop.train(config, tmp_path / "run")
    for line in lines_of(tmp_path / "run"):
        assert 1 <= line["train/load_balance"] <= 4 and line["train/router_z"] > 0
    run = gptjax.load(tmp_path / "run")
    assert run.params["blocks"]["mlp"]["up"]["kernel"].shape == (2, 4, 16, 64)
    assert summary["val_loss"] < 5.6 and run.logits([[1, 2]]).shape == (1, 2, 257)


@pytest.mark.slow
def test_a_run_learns(tmp_path, text_file):
    config = tiny_config(data_path=text_file, train_steps=300, optimizer_learning_rate=0.02, eval_every_steps=100)
    summary = loop.train(config, tmp_path / "run")
    looks = [line["val/bits_per_byte"] for line in lines_of(tmp_path / "run") if "val/loss" in line]
    assert looks == sorted(looks, reverse=True) and summary["val_bits_per_byte"] < 2.2


@pytest.mark.slow
@pytest.mark.parametrize("corruption", ["spans", "infilling"])
def test_an_encoder_decoder_learns_from_rows_that_its_objective_made_shorter(
    tmp_path, text_file, corruption, call_train
):
    changes = dict(model_arch="seq2seq", train_objective="denoising", objective_corruption=corruption, train_steps=3)
    result = call_train(tmp_path / "run", data_path=text_file, sample_prompt="the", eval_every_steps=3, **changes)
    assert result.code == 0 and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3, result.err


def test_a_source_too_long_for_the_sample_is_refused_before_training(tmp_path, text_file, call_train):
    changes = dict(model_arch="seq2seq", train_objective="denoising", sample_prompt="more than sixteen bytes")
    refusal = call_train(tmp_path / "run", data_path=text_file, **changes).refusal()
    assert (
        "the sample at the end cannot be drawn: the source has 24 tokens" in refusal and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(model_kernels="cpu"), "in blocks of queries, with a custom gradient"),
        (
            dict(model_kernels="cpu", model_dropout=0.1),
            "plain: dropout of attention weights is drawn by JAX (model.dropout)",
        ),
        (dict(model_kernels="plain"), "plain"),
    ],
)
def test_a_run_logs_its_attention_kernel(tmp_path, text_file, capsys, changes, told):
    config = tiny_config(data_path=text_file, **changes)
    setup = train_setup(config, tmp_path, 0.0, None)
    with Checkpoints(tmp_path, 1) as checkpoints:
        populations.init_or_restore(populations.of_one(setup), [checkpoints])
    assert f"\nattention  {told}\n" in capsys.readouterr().err


def test_a_finished_run_is_reported_and_not_changed(trained, text_file, call_train):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    result = call_train(trained, data_path=text_file)
    assert result.code == 0 and "is finished" in result.err and "bits per byte" in result.out
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


@pytest.mark.slow
def test_json_prints_objects_and_nothing_else(tmp_path, text_file, call_train):
    result = call_train(tmp_path / "run", "--json", data_path=text_file)
    objects = [json.loads(line) for line in result.out.splitlines()]
    assert [o["step"] for o in objects[:-1]] == [2, 4, 6, 8] and objects[-1].keys() == SUMMARY


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_code_3(tmp_path, text_file, call_train):
    result = call_train(tmp_path / "run", data_path=text_file, optimizer_learning_rate=1e38, optimizer_clip_norm=0)
    assert result.code == 3 and result.err.splitlines()[-1].startswith("gptjax: training diverged: the loss at step")
    assert not (tmp_path / "run" / "summary.json").exists()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert int(path.name) < 4, "what is not finite is not saved"


@pytest.mark.slow
def test_killed_at_any_step_a_run_ends_bit_identical(tmp_path, text_file):
    whole = start(tmp_path / "whole", text_file)
    assert whole.wait() == 0, whole.stderr.read()
    expected = params_of(tmp_path / "whole")
    for step in random.sample(range(5, 560), 3):
        workdir = tmp_path / f"killed_{step}"
        first = start(workdir, text_file)
        while not reached(workdir, step) and first.poll() is None:
            time.sleep(0.001)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL, f"to be killed at {step}, it ended before"
        saved = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
        second = start(workdir, text_file)
        _, err = second.communicate()
        assert second.returncode == 0, err
        assert ("resuming" in err) == saved
        jax.tree.map(np.testing.assert_array_equal, params_of(workdir), expected)
        assert all(p.name.isdigit() for p in (workdir / "checkpoints").iterdir()), "nothing half-written stays"
        steps = [line["step"] for line in lines_of(workdir)]
        assert steps == list(range(1, 601)), "each step has one line"
        losses = [[line["train/loss"] for line in lines_of(path)] for path in (workdir, tmp_path / "whole")]
        assert losses[0] == losses[1]


STAGES = ((3, 8, 8), (3, 4, 8))


@pytest.mark.slow
def test_resumed_inside_its_second_stage_a_run_ends_bit_identical(tmp_path, text_file, monkeypatch):
    changes = dict(data_path=text_file, data_stages=STAGES, model_layers=1, checkpoint_every_steps=4, log_every_steps=1)
    loop.train(tiny_config(**changes), tmp_path / "whole")
    save = loop.Checkpoints.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            loop.train(tiny_config(**changes), tmp_path / "stopped")
    said = []
    monkeypatch.setattr(loop.console, "say", said.append)
    loop.train(tiny_config(**changes), tmp_path / "stopped")
    assert any("at step 4 of 8" in line for line in said)
    compiled = [line.split(" for ")[1] for line in said if line.startswith("compiled")]
    assert compiled == ["4 x 8 tokens", "4 x 16 tokens"], "what lies behind is not compiled"
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "stopped"), params_of(tmp_path / "whole"))
    losses = [[line["train/loss"] for line in lines_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_tokens_per_second_and_mfu_follow_the_stages(tmp_path, monkeypatch):
    now = goodput.zero_reading()
    clock = SimpleNamespace(reading=lambda: dict(now), session=lambda: 0.0)
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1.0)
    config = tiny_config(data_stages=STAGES, log_every_steps=1)
    parts, stages = SimpleNamespace(mesh=SimpleNamespace(size=1)), batches.stages(config.data)
    run_batches = SimpleNamespace(stages=stages)
    setup = SimpleNamespace(config=config, parts=parts, batches=run_batches, workdir=tmp_path, clock=clock)
    state = SimpleNamespace(eval_shapes=lambda: {"a": np.zeros(10)})
    lines = []
    with Recorder([setup], state, 0, lambda *count, **shown: None, lambda m, line: lines.append(line), None) as found:
        for step in range(1, 9):
            found.push(step, {"loss": 1.0, "grad_norm": 1.0} | dict.fromkeys(skip_step.METRICS, 0))
            for kind, seconds in (("step", 0.75), ("data", 0.25), ("eval", 5), ("save", 5)):
                now[kind] += seconds
            found.write(found.take())
    size = [8 * 8] * 3 + [4 * 8] * 3 + [4 * 16] * 2
    assert [line["tokens_per_second"] for line in lines] == size
    flops = [60 + 12 * 2 * 16 * context for context in [8] * 6 + [16] * 2]
    assert [line["mfu"] / line["tokens_per_second"] for line in lines] == flops


@pytest.mark.slow
def test_the_speedrun_recipe_learns_within_thirty_steps(tmp_path, text_file):
    changes = {"data.path": text_file, "model.layers": 1, "model.width": 32, "train.steps": 30, "eval.every_steps": 30}
    changes |= {"schedule.warmup_steps": 3, "sample.prompt": "the"}
    recipe = ROOT / "configs" / "speedrun.py"
    config = configs.read(str(recipe), [f"--config.{key}={value}" for key, value in changes.items()])
    summary = loop.train(config, tmp_path / "run")
    assert summary["val_loss"] < 2.4, "it begins at 3.1, the logarithm of the alphabet's size"


@pytest.mark.slow
def test_two_processes_cannot_train_in_one_directory(tmp_path, text_file):
    first = start(tmp_path / "run", text_file, train_steps=100_000)
    try:
        while not reached(tmp_path / "run", 1):
            time.sleep(0.01)
        second = start(tmp_path / "run", text_file, train_steps=100_000)
        _, err = second.communicate()
        assert second.returncode == 2 and "another process is training in" in err.splitlines()[-1]
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
def test_a_second_start_reads_its_programs_from_the_cache(tmp_path, text_file):
    script = (
        "import sys\n"
        "from gptjax import train\n"
        "from gptjax.core import runtime\n"
        "runtime.start()\n"
        "import jax.monitoring\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name))\n"
        "train.main(sys.argv[1:])\n"
        "print('hits', hits.count('/jax/compilation_cache/cache_hits'), file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    hits = []
    for name in ("cold", "warm"):
        flags = [f"--config={BASE}", f"--workdir={tmp_path / name}", *overrides(data_path=text_file)]
        done = subprocess.run(
            [sys.executable, "-c", script, *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        hits.append(int(done.stderr.split("hits ")[-1]))
    assert hits[0] == 0 and hits[1] >= 3


@pytest.mark.slow
def test_shakespeare_as_nanogpt_trains_it(tmp_path, call):
    path, workdir = shared("data/tinyshakespeare/input.txt"), tmp_path / "shakespeare"
    command = [sys.executable, "-m", "gptjax.train", f"--config={ROOT / 'configs' / 'shakespeare.py'}"]
    flags = [f"--config.data.path={path}", f"--workdir={workdir}"]
    subprocess.run([*command, *flags], cwd=ROOT, env=os.environ | AS_USERS_RUN, check=True)
    figures = json.loads(call(evaluate, f"--workdir={workdir}", "--json").out)
    assert figures["tokens"] == 111_539 and figures["loss"] <= 1.90
