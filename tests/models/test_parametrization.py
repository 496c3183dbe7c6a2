"""muP against the paper's Table 8, against the standard parametrization at its base, and by the coordinate check."""

import math

import jax
import numpy as np
import pytest
from conftest import BASE, overrides, tiny_config

from gptjax import models, objectives, optim, sharding
from gptjax.config.errors import ConfigError
from gptjax.interpret import coordinates
from gptjax.models import logical_axes, parametrization
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state
from gptjax.training import setup
from gptjax.training.step import train_step

MUP = dict(model_parametrization="mup", model_base__width=16, model_base__head__width=8)


def named(changes):
    """Converts keys to the arguments of conftest's `overrides`."""
    return {key.replace("__", "_"): value for key, value in changes.items()}


def config_of(**changes):
    """The tiny recipe with a vocabulary; two underscores stand for one in a key."""
    return configs.with_vocabulary(tiny_config(**named(changes)), 257)


# arXiv 2203.03466, Table 8, of Adam: fan_in or fan_out as multiples of the base's, n of what grows with the width.
# (init. variance, multiplier, learning rate)
TABLE_8 = {
    "input": lambda n: (1, 1, 1),  # 1 / fan_in, of a fan_in that does not grow
    "output": lambda n: (1, 1 / n, 1),
    "hidden": lambda n: (1 / n, 1, 1 / n),
}


@pytest.mark.parametrize("name", TABLE_8)
@pytest.mark.parametrize("n", [1, 2, 8])
def test_table_8(name, n):
    own = parametrization.TABLE[name]
    assert (n ** (2 * own.std), n**own.multiplier, n**own.rate) == pytest.approx(TABLE_8[name](n))


def test_each_parameter_is_in_the_group_of_its_axes():
    """The group of a parameter depends on which of its axes, by their letters, grow with the width."""
    grows = set("DFHG")
    for flags in (
        dict(model_tied__head=False, model_use__bias=True, model_qk__norm="head", model_mlp="experts"),
        dict(model_activation="swiglu", model_norm="rmsnorm"),
    ):
        config = config_of(**flags)
        for path, leaf in jax.tree_util.tree_leaves_with_path(models.shapes(models.build(config.model))):
            names = [key.key for key in path]
            letters = logical_axes.parameter_axes(names, leaf.ndim).replace("E", "")
            if names[-1] == "kernel":
                first, last = (letter in grows for letter in letters[-2:])
                expected = {(True, True): "hidden", (True, False): "output"}[first, last]
            else:
                expected = "input"
            assert parametrization.group("/".join(names)) == expected, (names, letters)


def trained(config, steps=3):
    model, optimizer, mesh = models.build(config.model), optim.optimizer(config), sharding.make_mesh(data=1)
    step = jax.jit(train_step(objectives.loss(config, model), optimizer, mesh, 0))
    state = init_state(model, optimizer, 0)
    for _ in range(steps):
        state, output = step(state, coordinates.random_batch(config, 4))
    return state, output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "schedule_free"])
def test_at_the_base_it_is_the_standard_one_to_the_bit(name):
    flags = dict(optimizer_name=name, schedule_warmup__steps=1, model_tied__head=False)
    if name == "schedule_free":
        flags["schedule_name"] = "constant"
    plain, base = config_of(**flags), config_of(**flags, **MUP, model_base__layers=2)
    (state, output), (other, also) = trained(plain), trained(base)
    assert float(output["loss"]) == float(also["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)


@pytest.mark.slow
def test_first_numbers_and_rates_at_four_times_the_base():
    """Standard deviations and sizes of an Adam step by group; weight decay is unchanged."""
    wide = dict(model_width=64, model_heads=8, model_tied__head=False, schedule_warmup__steps=0)
    steps = dict(optimizer_clip__norm=0, optimizer_weight__decay=0, schedule_name="constant", **wide)
    plain, wider = config_of(**steps), config_of(**steps, **MUP)
    there, here = (models.init(models.build(c.model), jax.random.key(0)) for c in (plain, wider))
    ratio = jax.tree.map(lambda x, y: np.std(y) / max(np.std(x), 1e-9) if np.std(x) else 1.0, there, here)
    assert ratio["block_0"]["mlp"]["up"]["kernel"] == pytest.approx(0.5)
    assert ratio["head"]["kernel"] == ratio["tokens"]["embedding"] == pytest.approx(1)
    ones = jax.tree.map(np.ones_like, here)
    moved = {}
    for decay in (0.0, 0.5):
        config = config_of(**steps | dict(optimizer_weight__decay=decay, optimizer_learning__rate=0.1), **MUP)
        optimizer = optim.optimizer(config)
        updates, _ = optimizer.update(ones, optimizer.init(here), here)
        moved[decay] = jax.tree.map(lambda u: float(u.mean()), updates)
    assert moved[0.0]["block_0"]["mlp"]["up"]["kernel"] == pytest.approx(-0.1 / 4, rel=1e-4)
    for other in (moved[0.0]["head"]["kernel"], moved[0.0]["final_norm"]["scale"]):
        assert other == pytest.approx(-0.1, rel=1e-4)
    decayed = moved[0.5]["block_0"]["mlp"]["up"]["kernel"] - moved[0.0]["block_0"]["mlp"]["up"]["kernel"]
    assert decayed == pytest.approx(-0.1 * 0.5 * float(here["block_0"]["mlp"]["up"]["kernel"].mean()), abs=1e-6)


@pytest.mark.slow
def test_multipliers_of_logits_attention_and_depth():
    """Outputs are half of the standard model's if only the multipliers differ."""
    config = config_of(model_width=32, model_heads=2, model_tied__head=False, **MUP)
    assert config.model.attention_scale == pytest.approx(math.sqrt(8) / 16)
    standard = configs.ConfigDict(config.model).copy_and_resolve_references()
    standard.parametrization = "standard"
    model, other = models.build(config.model), models.build(standard)
    params, ids = models.init(other, jax.random.key(0)), np.arange(8)[None]
    np.testing.assert_allclose(
        2 * model.apply({"params": params}, ids), other.apply({"params": params}, ids), atol=1e-6
    )
    deep = config_of(model_layers=8, model_base__layers=2)
    assert parametrization.depth_factor(deep.model) == 0.5
    shallow = config_of(model_layers=8)
    assert models.layers.residual_std(deep.model) == 2 * models.layers.residual_std(shallow.model)


def checked(parametrized, name, **changes):
    flags = dict(model_head__width=16, model_context=16, optimizer_name=name, optimizer_learning__rate=1e-3) | changes
    flags |= dict(schedule_name="constant", schedule_warmup__steps=0, optimizer_weight__decay=0.0)
    mup = dict(model_parametrization="mup", model_base__width=32, model_base__head__width=16)
    config = configs.read(BASE, overrides(**named(flags | (mup if parametrized else {}))))
    return coordinates.slopes(widths := (32, 64, 128, 256), coordinates.over_widths(config, widths, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_activations_move_as_far_at_any_width_and_under_the_standard_one_do_not(name):
    flat, steep = checked(True, name), checked(False, name)
    inside = [path for path in flat if path != coordinates.LOGITS]
    assert len(inside) == 4
    assert max(abs(flat[path]) for path in inside) < 0.25 and abs(flat[coordinates.LOGITS]) < 0.5, flat
    assert min(steep[path] for path in inside) > 0.5, steep


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        (dict(model_parametrization="mup", model_base__width=8), "needs model.base_head_width"),
        (dict(model_base__width=8), "model.base_width is for model.parametrization=mup"),
        (dict(model_parametrization="mupp"), "did you mean mup?"),
        (dict(optimizer_name="adafactor", **MUP), "optimizer.name=adafactor has no known scaling rule"),
        (dict(model_arch="recurrent", **MUP), "model.arch is recurrent"),
        (dict(model_base__layers=0), "must be at least 1"),
    ],
)
def test_impossible(changes, output):
    with pytest.raises(ConfigError, match=output):
        setup.check(config_of(**changes))
