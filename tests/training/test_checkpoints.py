"""Checkpoints: what is saved comes back bit for bit, and damage is seen."""

import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import config as configs
from gptjax import models, optim, sharding
from gptjax.config import CheckpointError
from gptjax.training.checkpoints import Checkpoints, shapes_on
from gptjax.training.state import initial


def state_of(seed=0, **changes):
    config = configs.with_vocabulary(tiny_config(**changes), 257)
    return initial(models.build(config.model), optim.optimizer(config), seed)


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


def test_what_is_saved_comes_back_and_the_oldest_goes(saved):
    workdir, state = saved
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 3
        equal(checkpoints.restore(like(state)), state.replace(step=state.step + 3))
        equal(checkpoints.restore_params(like(state.params)), state.params)


def test_another_models_checkpoint_is_refused(saved):
    workdir, _ = saved
    with Checkpoints(workdir) as checkpoints, pytest.raises(CheckpointError, match="damaged or of another model"):
        checkpoints.restore(like(state_of(model_width=32)))


@pytest.mark.parametrize("keep", [None, 1])
def test_no_checkpoint_is_refused(tmp_path, keep):
    with Checkpoints(tmp_path, keep) as checkpoints, pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.restore(like(state_of()))
    assert (tmp_path / "checkpoints").exists() == (keep is not None), "who only reads makes nothing"


def test_a_half_written_checkpoint_goes_when_training_goes_on_and_stays_for_readers(saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    half = shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "4.orbax-checkpoint-tmp")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 3 and half.exists(), "it may be another process that is writing it"
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(4, saved[1])
        checkpoints.wait()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "4"]


def files_of(workdir):
    return sorted(p.relative_to(workdir) for p in (workdir / "checkpoints" / "3").rglob("*") if p.is_file())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # futures that orbax gives up
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_no_damaged_file_goes_unseen(saved, tmp_path, damage):
    """Each file of a checkpoint in turn: the checkpoint is refused, or what it gives is bit-identical."""
    workdir, state = saved
    refused = []
    for name in files_of(workdir):
        copy = tmp_path / name.as_posix().replace("/", "_")
        shutil.copytree(workdir, copy)
        content = (copy / name).read_bytes()
        if damage == "removed":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        with Checkpoints(copy) as checkpoints:
            try:
                equal(checkpoints.restore(like(state)), state.replace(step=state.step + 3))
            except CheckpointError as error:
                assert "checkpoints/3 is damaged" in str(error) and "\n" not in str(error)
                refused.append(name)
    assert any("/d/" in f"/{name}" for name in refused), "the files that hold the arrays are among the refused"
