"""Invalid values of every config key: a one-line error that names the key."""

import jax
import jax.numpy as jnp
import pytest
from conftest import BASE, generate, overrides, shared

from gptjax import train
from gptjax.config import limits
from gptjax.config.errors import ConfigError, UserError
from gptjax.core import arguments, machine
from gptjax.runs import config as configs
from gptjax.training import memory, setup

PLAIN = configs.read(BASE)
FLAT = configs.flatten(PLAIN)
NUMBERS = ("nan", "inf", "-inf", "1e300", "-1e300", "1e-300", "1" + "0" * 40)
BAD_FLAGS = (*NUMBERS, "1" + "0" * 20, "-1", "9" * 5000, "", "None", "text", "('a',)", "((1,),)")
FEW_FLAGS = ("nan", "None")
FEW_VALUES = (float("nan"), 10**300, None, {"a": 1})
NAN, INF = float("nan"), float("inf")
BAD_VALUES = (NAN, INF, -1, 1e300, 10**20, 10**300, None, "text", True, ("a",), ((1,),), {"a": 1}, [], b"x")
BEGIN = "from configs import base\ndef get_config():\n    c = base.get_config()\n"


def accepted(key):
    """Types of the values of a key; a whole number is a number, and a recipe may give a list."""
    types = configs.SCHEMA[key].types
    return (*types, *{float: (int,), tuple: (list,)}.get(types[0], ()))


def numeric(key):
    return int in accepted(key)


def outcome(config):
    """Returns the error of a config, or None if training would start to read its text."""
    try:
        resolved = configs.resolve(config)
        setup.check(resolved)
        memory.check_config(resolved)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("flags", [FEW_FLAGS, pytest.param(BAD_FLAGS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("key", FLAT)
def test_a_flag_that_cannot_be_is_refused_by_key_and_no_number_is_out_of_range(key, flags):
    for text in flags if numeric(key) else flags[-2:]:
        try:
            said = outcome(configs.read(BASE, [f"--config.{key}={text}"]))
        except ConfigError as error:
            said = str(error)
        assert said is None or (key in said and "\n" not in said), (text, said)
        if text in NUMBERS and numeric(key):
            assert said is not None, text


@pytest.mark.parametrize("values", [FEW_VALUES, pytest.param(BAD_VALUES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("key", FLAT)
def test_a_value_of_a_recipe_or_a_saved_config_that_cannot_be_is_refused_by_key(key, values):
    for given in values:
        config = PLAIN.copy_and_resolve_references()
        *sections, last = key.split(".")
        section = config
        for name in sections:
            section = section[name]
        with config.unlocked(), config.ignore_type():
            section[last] = given
        value = configs.flatten(config).get(key, given)  # as it was taken: True as 1.0
        said = outcome(config)
        assert said is None or (key in said and "\n" not in said), (value, said)
        kinds = accepted(key)
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
        if not fits:
            assert said is not None and "it must" in said, (value, said)
        damaged = list(configs.run_problems(configs.flatten(config)))
        assert bool(damaged) >= (not fits)


@pytest.mark.parametrize(
    ("key", "value"),
    [("labels", ((1, 2),)), ("labels", (1.5,)), ("labels", (True,)), ("fields", (1,)), ("fields", (("a",),))],
)
def test_a_list_of_names_holds_names(key, value):
    config = PLAIN.copy_and_resolve_references()
    config.data.examples[key] = value
    with pytest.raises(ConfigError, match=rf"data\.examples\.{key} is .*; it must be a list of names, such as"):
        configs.resolve(config)


def test_the_base_recipe_has_every_key_with_its_default():
    for key, declared in configs.SCHEMA.items():
        assert FLAT[key] == declared.default and isinstance(declared.default, declared.types), key
    assert FLAT.keys() == configs.SCHEMA.keys()


@pytest.mark.parametrize(
    "body, expected",
    [
        ("def get_config():\n    return {}", "get_config returns dict, not a config"),
        ("def get_config():\n    return None", "get_config returns NoneType, not a config"),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()", "its config lacks"),
        ("import sys\ndef get_config():\n    sys.exit(0)", "SystemExit"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("def get_config():\n    return get_config()", "RecursionError"),
        ("class Stop(BaseException): pass\nraise Stop('no')", "Stop: no"),
        ("def get_config(:", "SyntaxError"),
        ("get_config = 3", "TypeError"),
        (b"# caf\xe9", "recipe.py"),
        (b"\0", "null bytes"),
        (BEGIN + "    c.log.writers = 5\n    return c", "log.writers"),
        (BEGIN + "    c.model.layer = 5\n    return c",
         "unknown key model.layer; did you mean model.layers?"),
        (BEGIN + "    c.model.layers = None\n    return c",
         "model.layers is None; it must be a whole number"),
        (BEGIN + "    c.model = 5\n    return c", "model"),
    ],
)  # fmt: skip
def test_a_recipe_that_gives_no_config_is_one_line(tmp_path, body, expected):
    path = tmp_path / "recipe.py"
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    with pytest.raises(ConfigError) as caught:
        configs.read(str(path))
    assert expected in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_recipes_that_once_failed_are_one_line(call):
    for path in sorted(shared("cases/config_returns_dict").glob("*.py")):
        assert str(path) in call(train, f"--config={path}").refusal()


@pytest.mark.parametrize("name", ["folder", "folder.py", "notes.txt"])
def test_a_path_that_is_no_file_of_python_is_no_recipe(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match="is not a Python file"):
        configs.read(str(tmp_path / name))


@pytest.mark.parametrize(
    "value, bounds, expected",
    [
        (float("nan"), {}, "it must be a finite number"),
        (1e300, {}, "it must be at most 1e+38"),
        (-(10**20), {}, "it must be at least -2,147,483,647"),
        (2**31, {}, "it must be at most 2,147,483,647"),
        (-1, {"least": 0}, "it cannot be negative"),
        (0, {"least": 1}, "it must be at least 1"),
        (2**32, {"least": 0, "most": limits.SEED}, "it must be at most 4,294,967,295"),
        (1e-300, {}, "it must be 0, or at least 1e-37 in size"),
        (2**31 - 1, {}, ""),
        (1e-37, {}, ""),
        (0.0, {"least": 0}, ""),
    ],
)
def test_numbers_have_the_size_of_what_holds_them(value, bounds, expected):
    assert limits.range_problem(value, **bounds) == expected


@pytest.mark.parametrize("text", ["nan", "inf", "1e300", "", "hot", "1e", "9" * 5000, "0x1"])
def test_a_flag_that_is_no_number_is_refused_in_few_words(text):
    for kind in (int, float):
        parser = arguments.Parser()
        parser.add_argument("--x", type=arguments.number(kind))
        with pytest.raises(UserError) as caught:
            parser.parse_args([f"--x={text}"])
        assert "argument --x" in str(caught.value) and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "changes, keys",
    [
        ({"model.width": 10**6}, "model.width"),
        ({"model.vocabulary": 10**9}, "model.vocabulary"),
        ({"model.context": 10**9}, "data.context"),
        ({"data.batch_size": 2 * 10**9}, "data.batch_size"),
        ({"model.layers": 10**6, "model.scan_layers": True}, "model.layers"),
        ({"model.mlp_width": 10**9}, "model.mlp_width"),
        ({"model.mlp": "experts", "model.experts": 10**7}, "model.experts"),
        ({"model.arch": "recurrent", "model.width": 10**7}, "model.width"),
    ],
)
def test_what_no_memory_holds_is_refused_with_the_figure(changes, keys):
    said = outcome(configs.read(BASE, [f"--config.{key}={value}" for key, value in changes.items()]))
    assert said and "a step needs about" in said and "GiB, and " in said and keys in said


def test_memory_is_counted_as_the_state_is():
    """The estimate without shapes is at most the exact count, and close to it."""
    from functools import partial

    from gptjax import models, optim
    from gptjax.runs.train_state import init_state

    for flags in (
        [],
        ["--config.model.mlp=experts"],
        ["--config.model.positions=rotary", "--config.model.kv_heads=1", "--config.model.activation=swiglu"],
        ["--config.model.arch=recurrent"],
        ["--config.optimizer.name=muon", "--config.optimizer.ema=0.9"],
        ["--config.optimizer.name=sophia"],
        ["--config.optimizer.name=schedule_free"],
        ["--config.optimizer.name=lion"],
        ["--config.optimizer.name=adafactor"],
    ):
        config = configs.with_vocabulary(configs.resolve(configs.read(BASE, flags)), 4096)
        shapes = jax.eval_shape(partial(init_state, models.build(config.model), optim.optimizer(config), 0))
        least, exact = (
            sum(n.bytes for n in needs) for needs in (memory.lower_bound(config), memory.from_state(config, shapes))
        )
        assert 0.5 * exact < least <= exact, flags


def test_what_a_machine_has_is_the_least_of_what_is_free_and_what_a_group_may_have(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    (proc / "self" / "status").write_text("Name: x\nVmRSS: 100 kB\n")
    assert machine.process_memory(proc, groups) == 600 * 1024
    (proc / "self" / "cgroup").write_text("5:cpu:/a\n0::/pod/inner\n")
    (groups / "pod" / "inner").mkdir(parents=True)
    (groups / "pod" / "inner" / "memory.max").write_text("max\n")
    (groups / "pod" / "memory.max").write_text("200000\n")
    assert machine.process_memory(proc, groups) == 200_000
    (proc / "self" / "cgroup").write_text("4:memory:/not_shown_here\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("100000\n")
    assert machine.process_memory(proc, groups) == 100_000
    assert machine.process_memory(tmp_path / "absent", tmp_path / "absent") is None


def exhaust():
    jnp.zeros((10**7, 10**7)).block_until_ready()


def raised(kind, words):
    raise kind(words)


@pytest.mark.parametrize(
    "fail",
    [
        exhaust,
        lambda: raised(MemoryError, ""),
        lambda: raised(RuntimeError, "std::bad_alloc"),
        lambda: raised(RuntimeError, "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
    ],
)
def test_memory_that_runs_out_is_one_line(call, fail):
    class Module:
        @staticmethod
        def main(argv):
            fail()

    said = call(Module).refusal()
    assert said.startswith("out of memory") and "smaller" in said


def test_other_failures_are_not_taken_for_memory():
    assert arguments.memory_error_message(RuntimeError("INVALID_ARGUMENT: of memory")) == ""
    assert arguments.memory_error_message(ValueError("std::bad_alloc")) == ""


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--temperature=inf", "--temperature: it must be a finite number, not inf"),
        ("--top_p=nan", "--top_p: it must be a finite number, not nan"),
        ("--seed=-1", "--seed: it cannot be negative, not -1"),
        ("--max_tokens=1000000000000", "--max_tokens: it must be at most 2,147,483,647"),
        ("--samples=1000000000", "--samples: it must be at most 1,000,000"),
        ("--batch_size=100000000", "the key/value cache of 100,000,000 texts of"),
    ],
)
def test_flags_that_no_machine_can_do_are_refused(trained, call, flag, expected):
    assert expected in call(generate, f"--workdir={trained}", "--prompt=a", flag).refusal()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--config.init_from=nope", "--config.model.layers=3"], "init_from=nope is not a run"),
        (["--config.init_from=hf:./nope", "--config.model.layers=3"], "init_from=hf:./nope: there is no folder ./nope"),
        (["--config.init_from=nope", "--config.finetune.method=lora"], "init_from=nope is not a run"),
        (["--config.objective.teacher=nope", "--config.train.objective=distillation", "--config.model.heads=3"],
         "objective.teacher=nope is not a run"),
    ],
)  # fmt: skip
def test_what_is_named_must_exist_before_anything_is_concluded_from_it(tmp_path, call, flags, expected):
    message = call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *overrides(), *flags).refusal()
    assert message.startswith(expected)
    assert not list(tmp_path.iterdir())
