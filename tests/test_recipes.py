"""Every recipe, made tiny, trains two steps in both dtypes; those of fine-tuning begin with a tiny base."""

import json
import math

import pytest
from conftest import ROOT, tiny_config

from gptjax import config as configs
from gptjax.training import loop

TINY = {
    "model.layers": 1, "model.heads": 2, "model.kv_heads": 1, "model.head_width": 8, "model.width": 16,
    "model.mlp_width": 16, "model.context": 64, "model.vocabulary": None, "data.context": 64, "data.stages": (),
    "data.tokenizer": "bytes", "data.batch_size": 4, "data.held_out": 0.1, "schedule.warmup_steps": 1,
    "schedule.decay_steps": None, "train.steps": 2, "eval.every_steps": 2, "eval.batches": 1,
    "checkpoint.every_steps": 2, "log.every_steps": 1, "sample.prompt": "a", "sample.max_tokens": 1,
}  # fmt: skip
RECIPES = [
    "translate_lstm", "base", "bert:tiny", "gpt1", "gpt2:small", "gpt3:175b", "llama:tiny", "llama:70b", "modern:tiny",
    "modern:small", "novels", "shakespeare", "speedrun", "transformer:tiny", "translate", "finetune/hotels:base",
    "finetune/alpaca", "finetune/bbc", "finetune/dialogue", "finetune/hotels", "finetune/sst2", "finetune/sst2:lora",
]  # fmt: skip
QUICK = {("translate_lstm", "bfloat16"), ("llama:70b", "bfloat16")}


def turns(i):
    return [{"role": "user", "content": f"a {i}?"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text_file):
    """data.path of a recipe by its file's name; "" for those that read plain text."""
    folder = tmp_path_factory.mktemp("texts")
    lines = {
        "translate.tsv": [f"a {i}\tein {i}" for i in range(200)],
        "hotels.csv": ["label,review", *(f"{i % 2},fine {i}" for i in range(200))],
        "sst2.tsv": [f"fine {i}\t{i % 2}" for i in range(200)],
        "bbc.jsonl": [json.dumps({"article": f"a {i}", "summary": "b"}) for i in range(200)],
        "alpaca.jsonl": [json.dumps({"instruction": f"a {i}", "input": "", "output": "b"}) for i in range(200)],
        "dialogue.jsonl": [json.dumps({"messages": turns(i)}) for i in range(200)],
    }
    for name, of_file in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in of_file))
    paths = {name.partition(".")[0]: folder / name for name in lines}
    return paths | {"translate_lstm": paths["translate"], "transformer": paths["translate"], "": text_file}


@pytest.fixture(scope="module")
def base(tmp_path_factory, texts):
    """A run that others begin with."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    loop.train(tiny("base", "float32", texts[""]), workdir)
    return workdir


def tiny(recipe, dtype, data_path, **more):
    """The config of a recipe, with keys that it all but decides itself."""
    path, _, size = recipe.partition(":")
    config = configs.read(f"{ROOT / 'configs' / path}.py" + (f":{size}" if size else "")).copy_and_resolve_references()
    with config.unlocked():
        for key, value in (TINY | {"train.dtype": dtype, "data.path": str(data_path)}).items():
            section, name = key.split(".")
            config[section][name] = value
        config.update(more)
        config.data.source = "text"
        if config.model.encoder_layers:
            config.model.encoder_layers = 1
    return config.lock()


def cases():
    for recipe in RECIPES:
        for dtype in ("float32", "bfloat16"):
            yield pytest.param(recipe, dtype, marks=() if (recipe, dtype) in QUICK else pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "dtype"), list(cases()))
def test_a_recipe_trains(recipe, dtype, texts, tmp_path, request):
    name = recipe.rpartition("/")[2].partition(":")[0]
    tunes = "finetune" in recipe and not recipe.endswith(":base")
    begins = {"init_from": str(request.getfixturevalue("base"))} if tunes else {}
    summary = loop.train(tiny(recipe, dtype, texts.get(name, texts[""]), **begins), tmp_path / "run")
    assert math.isfinite(summary["val_loss"])


def test_every_recipe_is_one_of_these():
    files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.py")}
    assert files - {"finetune/methods"} == {recipe.partition(":")[0] for recipe in RECIPES}


def test_denoising_rows_that_a_mesh_cannot_divide_are_refused():
    from gptjax.training import mesh_checks

    config = tiny_config(model_arch="seq2seq", train_objective="denoising", mesh_context=2)
    assert any("does not divide rows of 5 tokens" in line for line in mesh_checks.problems(config, 2))
