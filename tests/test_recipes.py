"""Every recipe, made tiny, trains two steps in both dtypes."""

import math

import pytest
from conftest import ROOT, tiny_config

from gptjax import config as configs
from gptjax.training import loop

TINY = {
    "model.layers": 1, "model.heads": 2, "model.kv_heads": 1, "model.head_width": 8, "model.width": 16,
    "model.mlp_width": 16, "model.context": 16, "model.vocabulary": None, "data.context": 16, "data.stages": (),
    "data.tokenizer": "bytes", "data.batch_size": 4, "data.held_out": 0.1, "schedule.warmup_steps": 1,
    "schedule.decay_steps": None, "train.steps": 2, "eval.every_steps": 2, "eval.batches": 1,
    "checkpoint.every_steps": 2, "log.every_steps": 1, "sample.prompt": "a", "sample.max_tokens": 1,
}  # fmt: skip
RECIPES = [
    "translate_lstm", "base", "bert:tiny", "gpt1", "gpt2:small", "gpt3:175b", "llama:tiny", "llama:70b", "modern:tiny",
    "modern:small", "novels", "shakespeare", "speedrun", "transformer:tiny", "translate", "finetune/hotels:base",
]  # fmt: skip
QUICK = {("translate_lstm", "bfloat16"), ("llama:70b", "bfloat16")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text_file):
    """data.path by what a recipe reads."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "pairs.tsv").write_text("".join(f"a {i}\tein {i}\n" for i in range(200)))
    (folder / "reviews.csv").write_text("label,review\n" + "".join(f"{i % 2},fine {i}\n" for i in range(200)))
    return {"pairs": folder / "pairs.tsv", "examples": folder / "reviews.csv", "text": text_file}


def cases():
    for recipe in RECIPES:
        for dtype in ("float32", "bfloat16"):
            yield pytest.param(recipe, dtype, marks=() if (recipe, dtype) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("recipe", "dtype"), list(cases()))
def test_a_recipe_trains(recipe, dtype, texts, tmp_path):
    path, _, size = recipe.partition(":")
    config = configs.read(f"{ROOT / 'configs' / path}.py" + (f":{size}" if size else "")).copy_and_resolve_references()
    reads = "pairs" if config.data.languages else "examples" if config.data.examples.form else "text"
    with config.unlocked():
        for key, value in (TINY | {"train.dtype": dtype, "data.path": str(texts[reads])}).items():
            section, name = key.split(".")
            config[section][name] = value
        config.data.source = "text"
        if config.model.encoder_layers:
            config.model.encoder_layers = 1
    summary = loop.train(config.lock(), tmp_path / "run")
    assert math.isfinite(summary["val_loss"])


def test_denoising_rows_that_a_mesh_cannot_divide_are_refused():
    from gptjax.training import mesh_checks

    config = tiny_config(model_arch="seq2seq", train_objective="denoising", mesh_context=2)
    assert any("does not divide rows of 5 tokens" in line for line in mesh_checks.problems(config, 2))
