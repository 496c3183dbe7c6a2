"""Checkpoints: restored bit for bit, and checked for damage."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gptjax import models, optim, sharding
from gptjax.config.errors import CheckpointError
from gptjax.runs import checkpoint_dir, integrity
from gptjax.runs import config as configs
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.train_state import TrainState, init_state

# Tasks that orbax gives up when a save fails.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")


def state_of(seed=0, **changes):
    config = configs.with_vocabulary(tiny_config(**changes), 257)
    return init_state(models.build(config.model), optim.optimizer(config), seed)


def like(state):
    return shapes_on(jax.eval_shape(lambda: state), sharding.replicated(sharding.make_mesh()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    state = state_of()
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state.replace(step=state.step + step))
        checkpoints.wait()
    return workdir, state


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_states_are_restored_and_the_oldest_is_deleted(saved):
    workdir, state = saved
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 3
        equal(checkpoints.restore(like(state)), state.replace(step=state.step + 3))
        equal(checkpoints.restore_params(like(state.params)), state.params)


def test_a_checkpoint_of_another_model_is_refused(saved):
    workdir, _ = saved
    with (
        Checkpoints(workdir) as checkpoints,
        pytest.raises(CheckpointError, match="belongs to another model or cannot be read"),
    ):
        checkpoints.restore(like(state_of(model_width=32)))


@pytest.mark.parametrize("keep", [None, 1])
def test_a_missing_checkpoint_is_refused(tmp_path, keep):
    with Checkpoints(tmp_path, keep) as checkpoints, pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.restore(like(state_of()))
    assert (tmp_path / "checkpoints").exists() == (keep is not None), "who only reads makes nothing"


def test_an_incomplete_checkpoint_is_removed_by_the_writer_and_ignored_by_readers(saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    half = shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 3 and half.exists(), "it may be another process that is writing it"
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(4, saved[1])
        checkpoints.wait()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "4"]


def damaged(path, how):
    """Damages a file as disks and people do."""
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


def files_of(workdir, step, part):
    """Lists the files of a checkpoint: those of the parameters, or all others."""
    folder = workdir / "checkpoints" / str(step)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if (path.relative_to(folder).parts[0] == "params") == (part == "params")]


HOW = ["cut", "emptied", "flipped", "removed"]


@pytest.mark.parametrize("part", ["params", "rest"])
@pytest.mark.parametrize("how", HOW)
def test_any_damaged_file_of_the_newest_selects_the_one_before(saved, tmp_path, capsys, how, part):
    workdir, state = saved
    names = [path.relative_to(workdir) for path in files_of(workdir, 3, part)]
    assert len(names) >= 5
    for number, name in enumerate(names):
        copy = shutil.copytree(workdir, tmp_path / str(number))
        if (copy / name).stat().st_size:  # an empty file cannot be cut
            damaged(copy / name, how)
        elif how == "removed":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(b"x")
        checkpoints = Checkpoints(copy)
        assert checkpoints.newest_usable() == 2, name
        said = capsys.readouterr().err
        assert said.startswith("checkpoint 3 is damaged (") and "taking that of step 2" in said
        if name.name == integrity.NAME:
            continue
        assert name.name in said
        # Who reads parameters alone minds damage to them alone.
        assert checkpoint_dir.first_intact(checkpoints.directory, [3, 2], "params") == (2 if part == "params" else 3)
    checkpoints = Checkpoints(copy)
    equal(checkpoints.restore(like(state)), state.replace(step=state.step + 2))
    equal(checkpoints.restore_params(like(state.params)), state.params)


@pytest.mark.parametrize("part", ["params", "rest"])
@pytest.mark.parametrize("how", HOW)
def test_damage_of_all_checkpoints_is_an_error(saved, tmp_path, how, part):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    for step in (2, 3):
        damaged(max(files_of(workdir, step, part), key=lambda path: path.stat().st_size), how)
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no usable checkpoint; damaged: 3: .*; 2: .*; restore"):
            checkpoints.newest_usable()
        if part == "params":
            with pytest.raises(CheckpointError, match="usable"):
                checkpoints.restore_params(like(saved[1].params))


def test_damaged_checkpoints_are_quarantined_when_training_resumes(saved, tmp_path, capsys):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    for aside in ("damaged-3", "damaged-3.2"):
        damaged(workdir / "checkpoints" / "3" / "rest" / "_METADATA", "cut")
        with Checkpoints(workdir, keep=2) as checkpoints:
            assert checkpoints.newest_usable() == 2
            checkpoints.quarantine_after(2)
            assert f"checkpoint 3 is quarantined as {workdir / 'checkpoints' / aside}" in capsys.readouterr().err
            checkpoints.save(3, saved[1])
            checkpoints.wait()
            assert checkpoints.newest_usable() == 3
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["2", "3", "damaged-3", "damaged-3.2"]


def test_an_incomplete_checkpoint_is_reported_and_ignored(saved, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0] / "checkpoints" / "3", workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    assert Checkpoints(workdir).newest_usable() is None
    assert "checkpoint 4 is incomplete" in capsys.readouterr().err


def test_a_reader_takes_the_newer_checkpoint_if_the_writer_deletes_the_one_it_reads(saved, tmp_path, capsys):
    directory = shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")

    def as_a_run_saves(path):
        (directory / "2").rename(directory / "4")
        shutil.rmtree(directory / "3")
        monkeypatch.undo()
        raise FileNotFoundError

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(integrity, "digest", as_a_run_saves)
        assert checkpoint_dir.first_intact(directory, [3, 2]) == 4
    assert capsys.readouterr().err == ""


def test_sha256sum_accepts_the_digests(saved):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    folder = saved[0] / "checkpoints" / "3"
    listed = (folder / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == sum(path.is_file() for path in folder.rglob("*")) - 1
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_keep_best_keeps_that_number_of_checkpoints(tmp_path):
    state = state_of()
    with Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=2) as checkpoints:
        for step, loss in enumerate([5.0, 2.0, None, 4.0, 3.0, 6.0, 7.0], start=1):
            assert checkpoints.is_among_best(loss) == (step in (1, 2, 4, 5))
            checkpoints.save(step, state.replace(step=state.step + step), loss)
    reader = Checkpoints(tmp_path)
    assert checkpoint_dir.steps(reader.directory) == [7, 5, 4, 2]
    assert checkpoint_dir.losses(reader.directory) == {7: 7.0, 5: 3.0, 4: 4.0, 2: 2.0}
    # A new session knows them; "best" is the least loss, and the next where that one is damaged.
    with Checkpoints(tmp_path, keep=1, keep_best=2) as again:
        assert again.is_among_best(2.9) and not again.is_among_best(3.0) and not again.is_among_best(float("nan"))
    assert checkpoint_dir.candidate_steps(reader.directory, "best") == [2, 5, 4, 7]
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 2, 4, 5, 7"):
        reader.restore_params(like(state.params), 3)
    equal(reader.restore_params(like(state.params), "best"), state.params)


ON_EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import TrainState

def mesh(*sizes):
    return jax.make_mesh(sizes, ("a", "b"), devices=jax.devices()[: sizes[0] * sizes[1]])

square, row, three = np.arange(64.0).reshape(8, 8), np.arange(16.0), np.ones(3)
params = {"both": square, "one": row, "none": three}
state = TrainState(np.int32(7), params, {"mean": square**2}, {"skipped": np.int32(3)})
cut = TrainState(
    P(), {"both": P("a", "b"), "one": P("b"), "none": P()}, {"mean": P(None, ("a", "b"))}, {"skipped": P()}
)
placed = jax.tree.map(lambda x, names: jax.device_put(x, NamedSharding(mesh(4, 2), names)), state, cut)
with Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(7, placed)

cut = TrainState(P(), {"both": P("b"), "one": P("a"), "none": P()}, {"mean": P("b", "a")}, {"skipped": P()})
like = jax.tree.map(
    lambda x, names: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh(1, 4), names)), placed, cut
)
again = Checkpoints(Path(sys.argv[1])).restore(like)
jax.tree.map(np.testing.assert_array_equal, again, state)
assert placed.params["both"].addressable_shards[0].data.shape == (2, 4)
assert again.params["both"].addressable_shards[0].data.shape == (2, 8)
"""


def test_a_checkpoint_is_restored_on_any_mesh(tmp_path):
    """Written on eight devices, read on four with another sharding, and here on one."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES, tmp_path], env=environment, check=True, cwd=ROOT)
    square = np.arange(64, dtype=np.float32).reshape(8, 8)
    params = {"both": square, "one": np.arange(16, dtype=np.float32), "none": np.ones(3, np.float32)}
    state = TrainState(np.int32(7), params, {"mean": square**2}, {"skipped": np.int32(3)})
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        equal(checkpoints.restore(shapes_on(state, here)), state)
        equal(checkpoints.restore_params(shapes_on(params, here)), params)


@pytest.fixture
def limited():
    """`limited(bytes)` limits the size of files, also for root; None removes the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_is_logged_once_and_retried_and_loses_nothing(tmp_path, capsys, limited):
    now, state = [0.0], state_of()
    with Checkpoints(tmp_path, keep=1, clock=lambda: now[0]) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        limited(2000)
        for step, pause in ((2, 10), (3, 20), (4, 40)):
            checkpoints.save(step, state)
            while checkpoints.retry_at is None or checkpoints.retry_at <= now[0]:
                checkpoints.poll()
            assert checkpoints.retry_at == now[0] + pause
            assert checkpoint_dir.steps(checkpoints.directory) == [1], "the older one stays until the new one is whole"
            now[0] += pause
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        said = said.strip()
        assert said.startswith("checkpoint 2 cannot be written: the file would be larger")
        assert "the run continues" in said
        limited(None)
        checkpoints.save(5, state.replace(step=state.step + 5))
        checkpoints.wait()
        assert checkpoints.retry_at is None
        assert capsys.readouterr().err == "checkpoint 5 is written\n"
        assert [path.name for path in checkpoints.directory.iterdir()] == ["5"], "no half-written one is left"
        equal(checkpoints.restore(like(state)), state.replace(step=state.step + 5))


def test_late_writes_of_a_failed_save_do_no_harm(tmp_path, monkeypatch, limited):
    """Its threads write into the folder that the next save removes; that is retried, too."""
    monkeypatch.setattr("gptjax.runs.checkpoints.RETRY_SECONDS", 0.01)
    state = state_of()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        limited(2000)
        checkpoints.save(1, state)
        checkpoints.wait()
        limited(None)
        assert checkpoints.retry_at is not None
        with monkeypatch.context() as busy:
            busy.setattr(checkpoints, "_open", lambda: os.rmdir(tmp_path))
            checkpoints.save(1, state)
        checkpoints.finish(state)
    assert Checkpoints(tmp_path).newest_usable() == 1


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EEXIST])
def test_what_late_writes_leave_behind_is_an_error_of_the_disk_after_another_alone(tmp_path, number):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(OSError):
            checkpoints._failed(OSError(number, "a temporary folder"))
        checkpoints._failed(OSError(errno.ENOSPC, "no space"))
        checkpoints._failed(OSError(number, "a temporary folder"))
        assert checkpoints.retry_at is not None
        checkpoints.retry_at = None


def test_the_last_checkpoint_is_retried_for_a_while_before_the_run_fails(tmp_path, monkeypatch, capsys, limited):
    monkeypatch.setattr("gptjax.runs.checkpoints.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("gptjax.runs.checkpoints.LAST_SAVE_SECONDS", 0.5)
    state = state_of()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.finish(state)
    limited(2000)
    refused = pytest.raises(CheckpointError, match="run the same command again: checkpoint 2 could not be written")
    with refused, Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state)
        checkpoints.finish(state)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[1].startswith("checkpoint 2 is the last one; retrying for")
    limited(None)
    assert Checkpoints(tmp_path).newest_usable() == 1
