"""Configs: error messages of invalid ones, and round trips of valid ones."""

import ast

import pytest
from conftest import BASE, ROOT, tiny_config

from gptjax.config.errors import ConfigError
from gptjax.interop import weight_mapping
from gptjax.runs import config as configs
from gptjax.training import mesh_checks, setup


def base(*overrides):
    return configs.read(BASE, overrides)


def refused(*overrides, devices=1):
    with pytest.raises(ConfigError) as caught:
        config = configs.resolve(base(*overrides))
        configs.check(config, mesh_checks.problems(config, devices))
    return str(caught.value)


def test_overrides_keep_their_type():
    config = base("--config.model.layers=7", "--config.optimizer.learning_rate=1e-4", "--config.model.use_bias=True")
    assert (config.model.layers, config.optimizer.learning_rate, config.model.use_bias) == (7, 1e-4, True)


def test_a_misspelt_key_is_refused_with_the_nearest():
    assert refused("--config.model.layer=4") == "unknown key model.layer; did you mean model.layers?"
    assert "unknown key optimiser.beta1; did you mean optimizer.beta1?" in refused("--config.optimiser.beta1=4")


@pytest.mark.parametrize(
    "overrides, devices, expected",
    [
        (["--config.model.heads=5"], 1, "model.heads=5 does not divide model.width=128; or give model.head_width"),
        (["--config.model.windows=(-1,)"], 1, "model.windows is (-1,); it must be a list of integers"),
        (["--config.model.windows=()"], 1, "model.windows is ()"),
        (["--config.model.positions=rotary", "--config.model.head_width=7"], 1, "model.head_width=7 is odd"),
        (["--config.model.positions=rotary", "--config.model.rotary.theta=0.0"], 1, "must be more than 0"),
        (["--config.model.positions=rope"], 1, "model.positions has no choice 'rope'; there are learned, sinusoidal"),
        (["--config.model.rotary.scaling=lama3"], 1, "has no choice 'lama3'; did you mean llama3?"),
        (["--config.model.activation=swigl"], 1, "model.activation has no choice 'swigl'; did you mean swiglu?"),
        (["--config.model.experts_per_token=9"], 1, "model.experts_per_token=9 is more than model.experts=8"),
        (["--config.model.norm_epsilon=0.0"], 1, "model.norm_epsilon is 0.0; it must be more than 0"),
        (["--config.model.remat=all"], 1, "model.remat has no choice 'all'"),
        (["--config.model.kv_heads=3"], 1, "model.kv_heads=3 does not divide model.heads=4"),
        (["--config.data.context=512"], 1, "data.context=512 is longer than the 128 positions of model.context"),
        (["--config.data.batch_size=6"], 4, "data.batch_size=6 cannot be split over 4 devices; take a multiple of 4"),
        (["--config.data.batch_size=6", "--config.train.grad_accumulation=4"], 1, "take a multiple of 4"),
        (["--config.data.stages=(100, 16, 32)"], 1, "data.stages is (100, 16, 32); it must be like ((100, 16, 32),)"),
        (["--config.data.stages=((100, 16),)"], 1, "data.stages is ((100, 16),); it must be like ((100, 16, 32),)"),
        (["--config.data.stages=((0, 16, 32),)"], 1, "data.stages is ((0, 16, 32),); it must be like"),
        (["--config.data.stages=((9, 16, 129),)"], 1, "data.stages: 129 tokens are longer than the 128"),
        (
            ["--config.data.stages=((600, 16, 32), (500, 16, 64))"],
            1,
            "data.stages take 1100 steps of the 1100 of train.steps",
        ),
        (["--config.data.stages=((9, 6, 32),)"], 4, "data.stages: batch_size 6 cannot be split over 4 devices"),
        (["--config.mesh.data=3"], 2, "mesh.data=3 does not fit the 2 devices here"),
        (["--config.model.layers=0"], 1, "model.layers is 0; it must be at least 1"),
        (["--config.optimizer.learning_rate=-1"], 1, "optimizer.learning_rate is -1.0; it cannot be negative"),
        (["--config.model.dropout=1"], 1, "model.dropout is 1.0; it must be less than 1"),
        (["--config.train.dtype=float31"], 1, "train.dtype has no choice 'float31'; did you mean float32?"),
        (["--config.model.activation=gelo"], 1, "model.activation has no choice 'gelo'; did you mean gelu?"),
        (
            ["--config.schedule.name=x"],
            1,
            "schedule.name has no choice 'x'; there are cosine, linear, wsd, inverse_sqrt, constant",
        ),
        (["--config.optimizer.name=moon"], 1, "optimizer.name has no choice 'moon'; did you mean muon?"),
        (["--config.optimizer.beta2=1"], 1, "optimizer.beta2 is 1.0; it must be less than 1"),
        (
            ["--config.optimizer.name=schedule_free", "--config.optimizer.beta1=0"],
            1,
            "optimizer.beta1 is 0; schedule_free needs more than 0",
        ),
        (["--config.optimizer.ema=1"], 1, "optimizer.ema is 1.0; it must be less than 1"),
        (
            ["--config.optimizer.name=schedule_free", "--config.optimizer.ema=0.99"],
            1,
            "optimizer.name=schedule_free and optimizer.ema=0.99 both average; leave one out",
        ),
        (
            ["--config.optimizer.sophia.hessian_every_steps=0"],
            1,
            "optimizer.sophia.hessian_every_steps is 0; it must be at least 1",
        ),
        (["--config.schedule.cooldown_fraction=2"], 1, "schedule.cooldown_fraction is 2.0; it must be at most 1"),
        (["--config.log.writers=('csv',)"], 1, "log.writers has no choice 'csv'"),
        (["--config.log.statistics=15"], 1, "log.statistics=15 must be a multiple of log.every_steps=10"),
        (
            ["--config.log.profile_steps=10"],
            1,
            "log.profile_steps is (10,); it must be the first and the last step to trace, such as (10, 13), or ()",
        ),
        (["--config.log.profile_steps=13,10"], 1, "log.profile_steps is (13, 10); it must be 1 <= first <= last"),
        (["--config.log.profile_steps=-1,3"], 1, "log.profile_steps is (-1, 3); it must be 1 <= first <= last"),
        (["--config.log.profile_steps=0,3"], 1, "log.profile_steps is (0, 3); it must be 1 <= first <= last"),
        (["--config.log.profile_steps=1.5,3"], 1, "log.profile_steps is (1.5, 3); it must be the first and"),
        (
            ["--config.log.profile_steps=1,1101"],
            1,
            "log.profile_steps is (1, 1101); it must be 1 <= first <= last <= train.steps=1100",
        ),
        (["--config.train.steps=many"], 1, "flag --config.train.steps=many: invalid literal for int()"),
        (["--config.model=3"], 1, "model holds other keys; set one of them, such as --config.model.activation=..."),
        (["--stepz=3"], 1, "unknown flag --stepz=3"),
    ],
)
def test_impossible_values_are_refused_in_one_line(overrides, devices, expected):
    message = refused(*overrides, devices=devices)
    assert expected in message and "\n" not in message


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    config = configs.resolve(base("--config.model.vocabulary=100"))
    with pytest.raises(ConfigError, match="model.vocabulary=100 is smaller than the tokenizer's 257"):
        configs.with_vocabulary(config, 257)
    assert configs.with_vocabulary(configs.resolve(base()), 257).model.vocabulary == 257


def test_what_follows_from_other_keys_is_filled_in():
    config = configs.resolve(base("--config.model.context=64", "--config.model.width=128"))
    assert (config.data.context, config.model.mlp_width, config.model.kv_heads) == (64, 512, 4)


def test_a_gated_mlp_is_narrower_so_that_its_three_matrices_cost_what_two_do():
    width = configs.resolve(base("--config.model.activation=swiglu")).model.mlp_width
    assert width == 344 and abs(3 * width / (2 * 512) - 1) < 0.01
    given = configs.resolve(base("--config.model.activation=swiglu", "--config.model.mlp_width=99"))
    assert given.model.mlp_width == 99


def test_a_size_that_a_recipe_does_not_have_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"configs/gpt2.py has no 'huge'; there are small, medium, large, xl"):
        configs.read(str(ROOT / "configs" / "gpt2.py") + ":huge")


def test_gpt3_recipes_say_what_the_paper_says():
    """Table 2.1 and appendix B of arXiv 2005.14165: tokens per step, learning rate, warm-up of 375 million tokens."""
    table = {"small": (0.5e6, 6.0e-4), "xl": (1e6, 2.0e-4), "13B": (2e6, 1.0e-4), "175B": (3.2e6, 0.6e-4)}
    for size, (tokens, rate) in table.items():
        config = configs.resolve(configs.read(str(ROOT / "configs" / "gpt3.py") + f":{size}"))
        step = config.data.batch_size * config.data.context
        assert config.data.context == 2048 and step == pytest.approx(tokens, rel=0.05)
        assert config.optimizer.learning_rate == rate
        assert step * config.schedule.warmup_steps == pytest.approx(375e6, rel=0.01)
        assert step * config.schedule.decay_steps == pytest.approx(260e9, rel=0.01)
        assert step * config.train.steps == pytest.approx(300e9, rel=0.01)
        assert config.model.windows == (0, 256)


def test_a_resolved_config_survives_json_and_stays_locked():
    config = configs.resolve(base("--config.log.writers=('wandb',)", "--config.model.windows=(3, 0)"))
    again = configs.from_json(configs.to_json(config))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        again.model.layer = 3


def test_differences_name_the_keys_that_matter_only():
    changed = tiny_config(model_layers=3, log_every_steps=1, checkpoint_keep=9)
    assert configs.differences(tiny_config(), changed) == ["model.layers (2 there, 3 here)"]


@pytest.mark.parametrize(
    "body, expected",
    [("import nothing_like_it", "ModuleNotFoundError"), ("def get_config(:", "SyntaxError"), ("", "get_config")],
)
def test_a_recipe_that_fails_is_one_line(tmp_path, body, expected):
    path = tmp_path / "recipe.py"
    path.write_text(body)
    with pytest.raises(ConfigError, match=expected):
        configs.read(str(path))


def test_a_missing_recipe_is_refused():
    with pytest.raises(ConfigError, match="there is no recipe configs/nano.py"):
        configs.read("configs/nano.py")


def test_every_key_of_base_has_a_comment_and_every_recipe_reads():
    source = (ROOT / "configs" / "base.py").read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[-1], ast.Attribute) and len(node.targets) == 1:
            assert "  # " in lines[node.lineno - 1], lines[node.lineno - 1]
    for recipe in (ROOT / "configs").glob("*.py"):
        configs.check(configs.resolve(configs.read(str(recipe))))
    for recipe in (ROOT / "configs" / "finetune").glob("*.py"):
        methods = [] if recipe.stem == "methods" else ["full", "lora"]  # methods.py is no recipe; they share it
        for method in methods:
            config = configs.read(f"{recipe}:{method}", ["--config.init_from=runs/base", "--config.model.context=512"])
            setup.check(configs.resolve(config))


def test_a_hugging_face_model_has_every_key_of_base():
    filled = {"layers", "heads", "kv_heads", "head_width", "width", "mlp_width", "context", "vocabulary"}
    assert configs.flatten(weight_mapping.NEUTRAL).keys() | filled == configs.flatten(base().model).keys()
