"""A population compared with its members trained alone: the same numbers for every traced key."""

import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import BASE, ROOT, overrides

import gptjax
from gptjax import config as configs
from gptjax.config.errors import ConfigError
from gptjax.runs import checkpoint_dir
from gptjax.training import loop
from gptjax.training.population import members

VALUES = {
    "optimizer.learning_rate": (0.003, 0.01),
    "optimizer.weight_decay": (0.0, 0.3),
    "optimizer.beta1": (0.8, 0.95),
    "optimizer.beta2": (0.9, 0.99),
    "optimizer.epsilon": (1e-8, 1e-3),
    "optimizer.clip_norm": (0.0, 0.1),
    "schedule.warmup_steps": (0, 7),
    "schedule.decay_steps": (6, 8),
    "schedule.final_fraction": (0.0, 0.5),
    "model.init_std": (0.02, 0.1),
    "model.dropout": (0.1, 0.3),
    "seed": (0, 3),
    "data.seed": (1, 2),
}


def read(text_file, *flags, **changes):
    return configs.read(BASE, [*overrides(data_path=text_file, **changes), *flags])


def of_key(text_file, key, values, **changes):
    return [read(text_file, f"--config.{key}={value}", **changes) for value in values]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def compared(alone, member, tolerance=1e-5):
    """Raises an error if a run that was trained alone and a member differ."""
    for one, other in zip(lines(alone), lines(member), strict=True):
        for name in ("step", "train/loss", "grad_norm", "val/loss", "learning_rate"):
            assert (name in one) == (name in other), name
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (one["step"], name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance),
        gptjax.load(alone).params,
        gptjax.load(member).params,
    )


@pytest.mark.slow
@pytest.mark.parametrize("key", VALUES)
def test_member_vs_alone(key, text_file, tmp_path):
    """All files of a member equal those of a run that was trained alone."""
    made = of_key(text_file, key, VALUES[key])
    summaries = loop.train_population(made, [tmp_path / "0", tmp_path / "1"])
    alone = loop.train(made[1], tmp_path / "alone")
    compared(tmp_path / "alone", tmp_path / "1")
    assert summaries[1]["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-5)
    assert summaries[0]["val_loss"] != pytest.approx(alone["val_loss"], abs=1e-6)
    assert (tmp_path / "1" / "samples.txt").read_text() == (tmp_path / "alone" / "samples.txt").read_text()
    there = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "1").iterdir()} == there


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--config.optimizer.name=muon"],
        ["--config.optimizer.name=lion", "--config.train.grad_accumulation=2"],
        ["--config.optimizer.name=schedule_free", "--config.schedule.name=constant"],
        # with an epsilon of 1e-8 Sophia's update is the sign of what may be rounding alone
        ["--config.optimizer.name=sophia", "--config.optimizer.epsilon=0.01", "--config.schedule.name=wsd"],
        ["--config.optimizer.name=adafactor", "--config.schedule.name=linear"],
        ["--config.optimizer.ema=0.9", "--config.schedule.name=inverse_sqrt"],
        ["--config.data.layout=packed", "--config.model.dropout=0.1", "--config.model.scan_layers=True"],
    ],
)
def test_fifty_steps_vs_alone(flags, text_file, tmp_path):
    """Agrees within 1e-5 over 50 steps with several keys at once, for each optimizer and schedule."""
    rates = [f"--config.optimizer.learning_rate={rate}" for rate in (1e-3, 2e-3, 3e-3)]
    settings = dict(train_steps=50, eval_every_steps=25, checkpoint_every_steps=50)
    made = [read(text_file, *flags, rate, f"--config.seed={i}", **settings) for i, rate in enumerate(rates)]
    loop.train_population(made, [tmp_path / str(i) for i in range(3)])
    loop.train(made[2], tmp_path / "alone")
    compared(tmp_path / "alone", tmp_path / "2")


@pytest.mark.slow
def test_a_diverged_member_does_not_affect_others(text_file, tmp_path):
    """A member that diverges is frozen and has no summary; the others do not change."""
    made = of_key(text_file, "optimizer.learning_rate", (0.01, 1e20, 0.01), optimizer_clip_norm=0, guard_patience=2)
    heard = []
    good, bad, same = loop.train_population(
        made, [tmp_path / "0", tmp_path / "1", tmp_path / "2"], lambda member, line: heard.append(member)
    )
    assert bad is None and not (tmp_path / "1" / "summary.json").exists()
    assert good["val_loss"] == same["val_loss"] and heard.count(0) > heard.count(1)
    loop.train(made[0], tmp_path / "alone")
    compared(tmp_path / "alone", tmp_path / "0")


@pytest.mark.slow
def test_finished_members_are_not_trained_again(text_file, tmp_path):
    made = of_key(text_file, "seed", (0, 1))
    where = [tmp_path / "0", tmp_path / "1"]
    first = loop.train_population(made, where)
    written = (where[1] / "metrics.jsonl").read_bytes()
    assert loop.train_population(made, where) == first
    assert (where[1] / "metrics.jsonl").read_bytes() == written


@pytest.mark.slow
def test_a_killed_population_resumes(text_file, tmp_path):
    """Killed after a checkpoint, of which one member is damaged, it ends like one that was not."""
    settings = dict(train_steps=12, log_every_steps=1, optimizer_learning_rate=0.01)
    made = of_key(text_file, "optimizer.weight_decay", (0.0, 0.3), **settings)
    where = [tmp_path / "0", tmp_path / "1"]

    class Killed(Exception):
        pass

    def kill(member, line):
        if line["step"] == 10:
            raise Killed

    with pytest.raises(Killed):
        loop.train_population(made, where, kill)
    for file in (where[1] / "checkpoints" / "8").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(b"\0" * file.stat().st_size)
    loop.train_population(made, where)
    whole = [tmp_path / "whole-0", tmp_path / "whole-1"]
    loop.train_population(made, whole)
    for one, other in zip(where, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, gptjax.load(one).params, gptjax.load(other).params)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.model.width=32"], "model.width (16, 32) changes the compiled program"),
        (["--config.optimizer.name=lion"], "optimizer.name (adamw, lion)"),
        (["--config.schedule.decay_steps=4"], None),
    ],
)
def test_keys_that_change_the_program_are_refused(flags, said, text_file, tmp_path):
    made = [read(text_file), read(text_file, *flags)]
    where = [tmp_path / "0", tmp_path / "1"]
    if said is None:
        members.from_configs([configs.resolve(config) for config in made])
        return
    with pytest.raises(ConfigError) as refused:
        loop.train_population(made, where)
    assert said in str(refused.value) and "--vmap" in str(refused.value)
    assert not any(path.exists() for path in where)


@pytest.mark.slow
def test_members_on_several_devices_vs_one(text_file, tmp_path):
    """Four members on two devices equal four members on one device."""
    code = f"""
import sys
from pathlib import Path
import jax
from gptjax import config as configs
from gptjax.training import loop
assert jax.device_count() == int(sys.argv[1])
flags = {[*overrides(data_path=text_file), "--config.train.grad_accumulation=2"]!r}
made = [configs.read({BASE!r}, [*flags, f"--config.seed={{i}}"]) for i in range(4)]
loop.train_population(made, [Path(sys.argv[2]) / str(i) for i in range(4)])
"""
    for devices in (1, 2):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(devices), tmp_path / str(devices)], env=env, check=True)
    for i in range(4):
        compared(tmp_path / "1" / str(i), tmp_path / "2" / str(i))


@pytest.mark.slow
def test_members_have_profiles_and_their_best_checkpoints(text_file, tmp_path):
    settings = dict(checkpoint_keep_best=1, eval_every_steps=1, checkpoint_every_steps=8, log_profile_steps="3,4")
    made = of_key(text_file, "optimizer.learning_rate", (0.003, 1.0), **settings)
    where = [tmp_path / "0", tmp_path / "1"]
    loop.train_population(made, where)
    assert any((where[0] / "profile").rglob("perfetto_trace.json.gz"))
    for workdir in where:
        losses = {line["step"]: line["val/loss"] for line in lines(workdir)}
        best = min(losses, key=losses.get)
        there = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
        assert set(there) >= {best, 8}


def test_a_failed_save_of_one_member_is_retried(text_file, tmp_path, monkeypatch):
    complete, failed = checkpoint_dir.finalize, []

    def complete_or_fail(directory, step, loss):
        if directory.parent.name == "1" and not failed:
            failed.append(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        complete(directory, step, loss)

    monkeypatch.setattr(checkpoint_dir, "finalize", complete_or_fail)
    monkeypatch.setattr("gptjax.runs.checkpoints.RETRY_SECONDS", 0.01)
    loop.train_population(of_key(text_file, "seed", (0, 1)), [tmp_path / "0", tmp_path / "1"])
    assert failed == [4]
    for name in "01":
        assert (tmp_path / name / "checkpoints" / "8").is_dir() and (tmp_path / name / "summary.json").exists()
