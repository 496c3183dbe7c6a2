"""Bad steps in whole runs: skipped and counted, rolled back once, then a report and exit code 3."""

import functools
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

import gptjax
from gptjax import objectives
from gptjax.objectives.causal import causal
from gptjax.objectives.objective import Objective
from gptjax.runs import directory as workdirs
from gptjax.runs import train_state as states
from gptjax.runs.checkpoints import Checkpoints
from gptjax.training import loop, recovery
from gptjax.training.population import population as populations
from gptjax.training.setup import train_setup

STEPS = 20
CHANGES = dict(
    model_layers=1, train_steps=STEPS, log_every_steps=1, eval_every_steps=10, checkpoint_every_steps=4,
    guard_patience=3, schedule_name="constant",
)  # fmt: skip


def lines_of(workdir):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def digest(ids_BT):
    factors = np.arange(1, ids_BT.size + 1, dtype="uint32").reshape(ids_BT.shape) * np.uint32(2654435761)
    return (ids_BT.astype("uint32") * (factors ^ (factors >> 15))).sum(dtype="uint32")


@pytest.fixture(scope="module")
def digests(tmp_path_factory, text_file):
    """Digests of the batch of each step, starting with step 1."""
    setup = train_setup(tiny_config(data_path=text_file, **CHANGES), tmp_path_factory.mktemp("probe") / "run", 0.0)
    found = [digest(setup.batches.train[i]["inputs_BT"]) for i in range(200)]
    assert len(set(found)) == len(found)
    return found


@pytest.fixture
def plant(monkeypatch, digests):
    """`plant(steps, by)` multiplies the loss of these steps' batches."""

    def planted(steps, by=jnp.nan):
        bad = jnp.array([digests[step - 1] for step in steps])

        def objective(model, options):
            def loss(params, batch, rng):
                loss, said = causal(model)(params, batch, rng)
                factor = jnp.where(jnp.isin(digest(batch["inputs_BT"]), bad), by, 1.0)
                return loss * factor, {"loss": said["loss"] * factor}

            return loss

        monkeypatch.setitem(objectives.OBJECTIVES, "causal", Objective(objective))

    return planted


@pytest.fixture(scope="module")
def clean(tmp_path_factory, text_file):
    """`clean(first, last)`: parameters of a run without bad steps that leaves out these steps."""

    @functools.cache
    def run(first, last):
        workdir = tmp_path_factory.mktemp("clean") / "run"
        config = tiny_config(data_path=text_file, **CHANGES)
        train_setup(config, workdir, 0.0)
        workdirs.leave_out(workdir, first, last)
        loop.train(config, workdir)
        return gptjax.load(workdir).params

    return run


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_planted_nan_is_skipped_counted_and_logged_once(tmp_path, text_file, plant, clean, call_train):
    plant([6, 7])
    result = call_train(tmp_path / "run", data_path=text_file, **CHANGES)
    assert result.code == 0 and re.findall("skipped .*", result.err) == [
        "skipped    the loss at step 6 is nan (1 skipped so far)"
    ]
    lines = lines_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0] * 5 + [1] + [2] * 14
    assert [line["step"] for line in lines if line["train/loss"] is None] == [6, 7]
    assert (tmp_path / "run" / "loss.png").exists()
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and rates[2:] == [rates[2]] * 18, "warm-up takes two updates"
    equal(gptjax.load(tmp_path / "run").params, clean(6, 7))


@pytest.mark.slow
def test_the_optimizer_count_does_not_change_while_steps_are_skipped(tmp_path, text_file, plant, call_train):
    plant([2, 3])
    call_train(tmp_path / "run", data_path=text_file, **CHANGES)
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "run")]
    assert rates[:5] == pytest.approx([0, 0.003, 0.003, 0.003, 0.006])


@pytest.mark.slow
def test_bad_steps_in_a_row_are_rolled_back_and_left_out(tmp_path, text_file, plant, clean, call_train):
    """Leaves out as many steps before them too, but none before the checkpoint of step 8."""
    plant([10, 11, 12])
    result = call_train(tmp_path / "run", data_path=text_file, **CHANGES)
    assert result.code == 0 and result.err.count("rolling back to step 8: the loss at step 10 is nan") == 1
    assert workdirs.left_out(tmp_path / "run") == [(9, 12)]
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["train/loss"] is None] == [9, 10, 11, 12]
    assert lines[-1]["skipped_steps"] == 4 and not (tmp_path / "run" / recovery.REPORT).exists()
    equal(gptjax.load(tmp_path / "run").params, clean(9, 12))


@pytest.mark.slow
@pytest.mark.parametrize("at", [11, 14])
def test_interrupted_after_a_rollback_it_resumes_bit_identical(tmp_path, text_file, plant, clean, at):
    plant([10, 11, 12])
    config = tiny_config(data_path=text_file, **CHANGES)

    def cut(line):
        if line["step"] == at and workdirs.left_out(tmp_path / "run"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", cut)
    loop.train(config, tmp_path / "run")
    assert lines_of(tmp_path / "run")[-1]["skipped_steps"] == 4
    equal(gptjax.load(tmp_path / "run").params, clean(9, 12))


@pytest.mark.slow
def test_the_second_time_it_stops_with_a_report_also_when_restarted(tmp_path, text_file, plant, call_train):
    plant([10, 11, 12, 16, 17, 18])
    for _ in range(2):
        result = call_train(tmp_path / "run", data_path=text_file, **CHANGES)
        last = result.err.splitlines()[-1]
        assert result.code == 3 and last.startswith("gptjax: training diverged: the loss at step 16 is nan"), last
        assert "steps 9 to 12 were left out" in last and "diverged.json" in last
        report = json.loads((tmp_path / "run" / recovery.REPORT).read_text())
        assert report["step"] == 16 and report["bad_steps"] == [16, 18] and report["loss"] is None
        assert report["first_nonfinite"]["what"] == "loss", "which is where it was planted"
    batch = train_setup(tiny_config(data_path=text_file, **CHANGES), tmp_path / "run", 0.0).batches.train[15][
        "inputs_BT"
    ]
    assert report["batch"]["inputs_sha256"] == hashlib.sha256(batch.tobytes()).hexdigest()
    assert report["batch"]["rows_begin"][0] == bytes(batch[0].tolist()).decode(errors="replace")
    assert list(report["losses"])[-1] == "18" and report["losses"]["15"] > 0
    assert not (tmp_path / "run" / "summary.json").exists()


def test_without_a_checkpoint_it_stops_and_names_the_first_layer(tmp_path, text_file, monkeypatch, call_train):
    def spoilt(params, optimizer):
        kernel = params["block_0"]["mlp"]["up"]["kernel"]
        params["block_0"]["mlp"]["up"]["kernel"] = 3e38 * jnp.sign(kernel)
        return init_from_params(params, optimizer)

    init_from_params = states.init_from_params
    monkeypatch.setattr(states, "init_from_params", spoilt)
    result = call_train(tmp_path / "run", data_path=text_file, **CHANGES)
    assert result.code == 3 and "the first activation that is not finite is block_0/mlp/up" in result.err
    assert "steps 1 to 3 were all skipped, before the first checkpoint" in result.err
    report = json.loads((tmp_path / "run" / recovery.REPORT).read_text())
    assert report["first_nonfinite"] == {"what": "activation", "where": "block_0/mlp/up"} and report["step"] == 1


@pytest.mark.slow
def test_bad_steps_at_the_end_of_a_run_are_rolled_back_too(tmp_path, text_file, plant, clean):
    plant([18, 19, 20])
    loop.train(tiny_config(data_path=text_file, **CHANGES), tmp_path / "run")
    assert workdirs.left_out(tmp_path / "run") == [(17, 20)]
    equal(gptjax.load(tmp_path / "run").params, clean(17, 20))


def of_members(text_file, tmp_path):
    """Configs of two members that read other batches, and their directories; what is planted is in the first one's."""
    made = [tiny_config(data_path=text_file, data_seed=seed, **CHANGES) for seed in (0, 1)]
    return made, [tmp_path / "0", tmp_path / "1"]


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


@pytest.mark.slow
def test_a_member_rolls_back_as_a_run_does_and_the_others_lose_nothing(tmp_path, text_file, plant, clean):
    plant([10, 11, 12])
    made, where = of_members(text_file, tmp_path)
    loop.train_population(made, where)
    assert [workdirs.left_out(workdir) for workdir in where] == [[(9, 12)], []]
    first, second = map(lines_of, where)
    assert [line["step"] for line in first if line["train/loss"] is None] == [9, 10, 11, 12]
    assert first[-1]["skipped_steps"] == 4 and second[-1]["skipped_steps"] == 0
    close(gptjax.load(where[0]).params, clean(9, 12))
    loop.train(made[1], tmp_path / "alone")
    close(gptjax.load(where[1]).params, gptjax.load(tmp_path / "alone").params)


@pytest.mark.slow
def test_a_member_that_rolled_back_in_vain_stops_with_a_report(tmp_path, text_file, plant):
    plant([10, 11, 12, 16, 17, 18])
    made, where = of_members(text_file, tmp_path)
    summaries = loop.train_population(made, where)
    assert summaries[0] is None and summaries[1]["steps"] == STEPS
    report = json.loads((where[0] / recovery.REPORT).read_text())
    assert report["bad_steps"] == [16, 18] and report["first_nonfinite"]["what"] == "loss"
    assert [line["step"] for line in lines_of(where[0])] == list(range(1, 18))
    assert len(lines_of(where[1])) == STEPS and not (where[1] / recovery.REPORT).exists()


def test_later_checkpoints_are_deleted_and_the_same_steps_saved_again(tmp_path):
    """Orbax silently saves no step below the newest one."""
    params = {"a": jnp.zeros(2)}
    state = states.init_from_params(params, optax.sgd(0.1))
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in (4, 8, 10):
            checkpoints.save(step, state.replace(step=jnp.array(step)))
        assert [checkpoints.newest_before(step) for step in (4, 8, 9, 30)] == [None, 4, 8, 10]
        checkpoints.delete_after(4)
        assert checkpoints.latest() == 4
        checkpoints.save(8, state.replace(step=jnp.array(8)))
        checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]


LONG = CHANGES | dict(train_steps=200, checkpoint_every_steps=200, eval_every_steps=200, optimizer_learning_rate=1e-3)
SPIKES = dict(guard_spike_z=6, guard_warmup_steps=50)


@pytest.mark.slow
def test_a_planted_spike_is_skipped_and_ordinary_steps_are_not(tmp_path, text_file, plant, call_train):
    loop.train(tiny_config(data_path=text_file, **LONG | SPIKES), tmp_path / "ordinary")
    assert lines_of(tmp_path / "ordinary")[-1]["skipped_steps"] == 0
    plant([150], by=30.0)
    result = call_train(tmp_path / "guarded", data_path=text_file, **LONG | SPIKES)
    assert re.search(
        r"skipped    the \S+ .*at step 150 is .* standard deviations above its mean \(1 skipped", result.err
    )
    lines = lines_of(tmp_path / "guarded")
    assert [line["skipped_steps"] for line in lines] == [0] * 149 + [1] * 51
    loop.train(tiny_config(data_path=text_file, **LONG), tmp_path / "open")
    assert lines_of(tmp_path / "open")[-1]["skipped_steps"] == 0, "spikes are skipped where a run asks for it"


@pytest.mark.slow
def test_statistics_are_reset_when_batches_change(tmp_path, text_file, monkeypatch):
    seen = []
    take_step = populations.take_step

    def spy(*arguments):
        state, values = take_step(*arguments)
        seen.append(np.max(state.guard.seen))
        return state, values

    monkeypatch.setattr(populations, "take_step", spy)
    config = tiny_config(data_path=text_file, data_stages=((3, 4, 16),), model_layers=1)
    loop.train(config, tmp_path / "run")
    assert seen == [1, 2, 3, 1, 2, 3, 4, 5]
    seen.clear()
    loop.train_population([config, config], [tmp_path / "0", tmp_path / "1"])
    assert seen == [1, 2, 3, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(guard_patience=0), "guard.patience is 0; it must be at least 1"),
        (dict(guard_spike_z=-1), "guard.spike_z is -1.0; it cannot be negative"),
        (dict(guard_spike_z=6, guard_warmup_steps=1), "guard.warmup_steps is 1; detecting spikes"),
    ],
)
def test_invalid_limits_are_refused(tmp_path, text_file, call_train, changes, told):
    assert call_train(tmp_path / "run", data_path=text_file, **changes).refusal().startswith(told)
