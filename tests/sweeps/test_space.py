"""Search spaces: flags are read or refused, ranges drawn, and scales detected."""

import json
import sys

import numpy as np
import pytest
from conftest import BASE, ROOT, overrides

from gptjax.runs import config as configs
from gptjax.sweeps import recipe, space, trials
from gptjax.sweeps.space import Range
from gptjax.sweeps.trials import Search

sys.path.append(str(ROOT / "experiments"))

import sweep

RATE = "optimizer.learning_rate"


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--set", "optimizer.learning_rat=1"], "unknown key optimizer.learning_rat; did you mean optimizer.learning_"),
        (["--set", "optimizer=1"], "optimizer holds other keys; set one of them"),
        (["--set", "model.layers=2,2.5"], "--set model.layers: '2.5' is of another type than the recipe's 4"),
        (["--set", "model.kv_heads=1,x"], "--set model.kv_heads: 'x' is of another type than the recipe's None"),
        (["--set", "seed="], "--set seed=: the list is empty"),
        (["--set", "seed=1,,2"], "--set seed=1,,2: a value is empty"),
        (["--set", "seed=1,2,1"], "--set seed has 1 twice"),
        (["--set", "seed"], "--set seed: it must be KEY=VALUE"),
        (["--set", "seed=1", "--set", "seed=2"], "--set seed is given twice"),
        (["--set", "seed=1", "--config.seed=2"], "seed is swept and set by --config.seed"),
        (["--set", f"{RATE}=log:1e-4..1e-2"], "is a range; give --random=N or --optuna=N too"),
        (["--set", f"{RATE}=log:1e-2..1e-4", "--random=2"], "the range is empty"),
        (["--set", f"{RATE}=log:0..1", "--random=2"], "a log range must start above 0"),
        (["--set", f"{RATE}=int:0.5..1", "--random=2"], "an int range needs integer bounds"),
        (["--set", "optimizer.name=lin:1..2", "--random=2"], "optimizer.name is not a number"),
        (["--set", "seed=1", "--random=0"], "--random: it must be at least 1, not 0"),
        (["--set", "seed=1", "--random=2", "--optuna=2"], "--random and --optuna do not go together"),
        (["--set", "seed=1", "--storage=x"], "--storage and --study are for --optuna=N"),
        (["--files=absent.json"], "cannot read absent.json"),
        (["--files="], "the list is empty"),
        ([], "nothing is swept"),
        (
            ["--set", "model.heads=2,3"],
            "the trial heads=3 is impossible: model.heads=3 does not divide model.width=128",
        ),
        (["--sets", "seed=1"], "unknown flag --sets"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(tmp_path, call, flags, expected):
    message = call(sweep, f"--config={BASE}", f"--workdir={tmp_path / 'sweep'}", *flags).refusal()
    assert expected in message
    assert not (tmp_path / "sweep").exists()


def test_a_directory_of_something_else_is_refused(trained, tmp_path, call):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("")
    flags = [f"--config={BASE}", "--set", "seed=0"]
    assert "is a run, not a sweep" in call(sweep, *flags, f"--workdir={trained}").refusal()
    assert "exists and is not a sweep" in call(sweep, *flags, f"--workdir={tmp_path / 'notes'}").refusal()
    assert "File exists" in call(sweep, *flags, f"--workdir={tmp_path / 'file' / 'sweep'}").refusal()


def test_values_have_the_types_of_their_keys_and_commas_in_brackets_do_not_split():
    sets = ["model.layers=2,3", f"{RATE}=1,1e-3", "model.use_bias=true,false", "data.stages=((10,8,64),),()"]
    found = space.read(sets, BASE, [])
    expected = [(2, 3), (1.0, 0.001), (True, False), (((10, 8, 64),), ())]
    assert [*found.values()] == expected and type(found[RATE][0]) is float
    assert len(space.grid(found)) == 16
    assert space.grid(found)[1] == space.grid(found)[0] | {"data.stages": ()}


def test_draws_stay_in_their_range_and_fill_it_evenly_on_its_scale():
    axes = space.read([f"{RATE}=log:1e-4..1e-2", "optimizer.beta1=lin:0.5..0.9", "model.layers=int:1..4"], BASE, [])
    drawn = [space.draw(axes, 0, number) for number in range(2000)]
    rates, betas, layers = (np.array([one[key] for one in drawn]) for key in axes)
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and abs(np.mean(rates < 1e-3) - 0.5) < 0.05
    assert betas.min() >= 0.5 and betas.max() <= 0.9 and abs(np.mean(betas < 0.7) - 0.5) < 0.05
    assert all(type(one["model.layers"]) is int for one in drawn)
    assert np.abs(np.bincount(layers, minlength=5)[1:] / 2000 - 0.25).max() < 0.05
    whole = [Range("log", 1, 100).draw(np.random.default_rng(number)) for number in range(500)]
    assert min(whole) == 1 and max(whole) > 80 and abs(np.mean(np.array(whole) <= 10) - 0.5) < 0.1


def test_more_draws_do_not_change_the_first():
    axes = space.read([f"{RATE}=log:1e-4..1e-2"], BASE, [])
    few, many = (trials.random(Search(BASE, [], axes, "random", n_trials, 7)) for n_trials in (3, 6))
    assert many[:3] == few and len({one[RATE] for one in many}) == 6
    assert trials.random(Search(BASE, [], axes, "random", 3, 8)) != few


def test_files_are_objects_or_recipes_and_combine_with_lists(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"optimizer": {"learning_rate": 1}, "model.layers": 3}))
    own = "def get_config():\n    c = base.get_config()\n    c.model.layers = 5\n    return c\n"
    (tmp_path / "b.py").write_text(f"from configs import base\n\n{own}")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.py")]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    search = Search(BASE, [], space.read(["seed=0,1"], BASE, []), "files", files=files)
    found = [one.values for one in trials.list_trials(search, tmp_path)]
    plain = configs.read(BASE).optimizer.learning_rate
    assert found == [
        {RATE: rate, "model.layers": layers, "seed": seed} for rate, layers in ((1.0, 3), (plain, 5)) for seed in (0, 1)
    ]
    (tmp_path / "a.json").write_text('{"model.layer": 3}')
    with pytest.raises(configs.ConfigError, match=r"a.json: unknown key model.layer; did you mean model.layers"):
        trials.list_trials(search, tmp_path)


def test_the_name_of_a_trial_depends_only_on_its_values():
    one, other = {RATE: 0.001, "seed": 1}, {"seed": 1, RATE: 0.001}
    assert trials.trial_name(one).rsplit("-", 1)[1] == trials.trial_name(other).rsplit("-", 1)[1]
    assert trials.trial_name(one) != trials.trial_name({RATE: 0.0010000001, "seed": 1})
    assert "/" not in trials.trial_name({"data.path": "/tmp/a b"})


def test_a_written_recipe_has_the_same_config_and_types(tmp_path):
    config = space.with_values(configs.read(BASE, overrides()), {RATE: 0.5, "data.stages": ((10, 8, 64),)})
    path = tmp_path / "best.py"
    path.write_text(recipe.as_recipe(config, "the best", [RATE]))
    assert configs.flatten(configs.read(str(path))) == configs.flatten(config)
    assert configs.read(str(path), ["--config.model.kv_heads=1"]).model.kv_heads == 1
    assert "learning_rate = 0.5  # swept" in path.read_text()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1e-4, 3e-4, 1e-3], True),
        ([8, 16, 32], True),
        ([0.1, 1.0], True),
        ([1, 2, 3], False),
        ([0.9, 0.95, 0.99], False),
        ([0.0, 1.0, 10.0], False),
        (["a", "b"], False),
        ([1.0], False),
    ],
)
def test_scales(values, expected):
    assert space.is_log(values) == expected
