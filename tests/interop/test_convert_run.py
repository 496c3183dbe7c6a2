"""Tests conversion of runs to Hugging Face folders and back: bit-exact, atomic, and usable like any other run."""

import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import BASE, ROOT, evaluate, generate, overrides, tiny_config, train
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gptjax
from gptjax import convert, models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.interop import convert_run, families
from gptjax.models.stacking import stack
from gptjax.runs import config as configs
from gptjax.runs.run import Run
from gptjax.training.loop import train as run_training

sys.path.append(str(ROOT / "tests" / "golden"))
import make_hf

# config.model keys of each family, small and odd.
FAMILIES = {
    "gpt2": dict(model_use_bias=True, model_norm_epsilon=1e-6),
    "openai-gpt": dict(model_use_bias=True, model_norm_position="post", model_residual_init="plain"),
    "gpt_neo": dict(
        model_use_bias=True, model_qkv_bias=False, model_attention_scale=1.0, model_windows="(0,5)", model_layers=3
    ),
    "llama": dict(model_norm="rmsnorm", model_positions="rotary", model_activation="swiglu", model_tied_head=False),
    "mistral": dict(
        model_norm="rmsnorm", model_positions="rotary", model_activation="swiglu", model_kv_heads=1,
        model_head_width=6, model_windows="(7,)",
    ),
    "qwen2": dict(
        model_norm="rmsnorm", model_positions="rotary", model_activation="swiglu", model_qkv_bias=True,
        model_windows="(0,0,7)", model_layers=3,
    ),
    "qwen3": dict(
        model_norm="rmsnorm", model_positions="rotary", model_activation="swiglu", model_qk_norm="head",
        model_mlp_width=23, **{"model_rotary.theta": 5000.0},
    ),
}  # fmt: skip


def random_run(workdir, seed=0, **changes):
    """Returns a run with random parameters without a directory."""
    tokenizer = tokenizers.bytes_encoding()
    config = configs.with_vocabulary(tiny_config(**changes), 260)
    model = models.build(config.model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), models.shapes(model))
    return Run(workdir, config, model, params, tokenizer)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A GPT-2 with random parameters as a Hugging Face folder; read-only."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    convert_run.export_run(random_run(folder.parent, **FAMILIES["gpt2"]), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of `exported` that may be changed."""
    return shutil.copytree(exported, tmp_path / "hf")


def tensors(folder):
    return load_file(folder / "model.safetensors")


def refused(folder, workdir, **changes):
    with pytest.raises(DataError) as caught:
        convert_run.import_run(str(folder), workdir, **changes)
    assert not workdir.exists() and not list(workdir.parent.glob(f".{workdir.name}*"))
    return str(caught.value)


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_export_and_import_are_bit_exact(family, tmp_path):
    run = random_run(tmp_path, **FAMILIES[family])
    made = convert_run.export_run(run, tmp_path / "hf", shard_bytes=30_000)
    assert made["family"] == family and not made["remark"]
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1, "more than one shard"
    convert_run.import_run(str(tmp_path / "hf"), tmp_path / "run")
    again = gptjax.load(tmp_path / "run")
    equal(again.params, run.params)
    assert families.canonical(again.config.model.to_dict()) == families.canonical(run.config.model.to_dict())
    convert_run.export_run(again, tmp_path / "again")
    whole = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        whole |= load_file(path)
    equal(tensors(tmp_path / "again"), whole)
    ids = np.arange(12)[None]
    np.testing.assert_array_equal(again.logits(ids), run.logits(ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_transformers_loads_what_is_exported_and_writes_the_same_text(family, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    run = random_run(tmp_path, **FAMILIES[family])
    convert_run.export_run(run, tmp_path / "hf", shard_bytes=30_000)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("ab ", return_tensors="pt").input_ids
    assert prompt[0].tolist() == list(b"ab ")
    with torch.no_grad():
        theirs = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()[3:]
    ours = run.generate("ab ", temperature=0, max_tokens=12).ids
    length = len(ours)
    assert ours == theirs[:length] and (length == 12 or ours[-1] in (256, 257, 258, 259))


@pytest.mark.slow
def test_what_transformers_saves_is_read_in_bfloat16_and_in_shards(tmp_path):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    make_hf.make("qwen2", "golden", tmp_path / "hf", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found = []
    for folder in (tmp_path / "hf", tmp_path / "shards"):
        family, config = families.model_of(json.loads((folder / "config.json").read_text()))
        found.append(convert_run.read_params(folder, family, config))
    equal(*found)
    logits = models.logits(models.build(config), found[0], np.load(tmp_path / "hf" / "expected.npz")["ids"][:, :-1])
    np.testing.assert_allclose(logits, np.load(tmp_path / "hf" / "expected.npz")["logits"], atol=1e-4)


def test_bfloat16_files_are_half_as_large_and_come_back_bit_exact(tmp_path):
    run = random_run(tmp_path)
    rounded = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16).astype("f"), run.params)
    convert_run.export_run(Run(run.workdir, run.config, run.model, rounded, run.tokenizer), tmp_path / "hf", "bfloat16")
    with safe_open(tmp_path / "hf" / "model.safetensors", "numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    convert_run.import_run(str(tmp_path / "hf"), tmp_path / "run")
    convert_run.export_run(gptjax.load(tmp_path / "run"), tmp_path / "again", "bfloat16")
    equal(tensors(tmp_path / "again"), tensors(tmp_path / "hf"))


@pytest.mark.slow
def test_a_model_without_biases_is_written_with_biases_of_zero(trained, tmp_path):
    run = gptjax.load(trained)
    assert "zero" in convert_run.export_run(run, tmp_path / "hf")["remark"]
    convert_run.import_run(str(tmp_path / "hf"), tmp_path / "run")
    again = gptjax.load(tmp_path / "run")
    assert again.generate("the ", temperature=0, max_tokens=9) == run.generate("the ", temperature=0, max_tokens=9)
    assert not again.params["final_norm"]["bias"].any()


def test_scanned_runs_are_written_layer_by_layer(tmp_path):
    run = random_run(tmp_path, **FAMILIES["llama"])
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.scan_layers = True
    stacked = Run(tmp_path, config, models.build(config.model), stack(run.params), run.tokenizer)
    convert_run.export_run(run, tmp_path / "one")
    convert_run.export_run(stacked, tmp_path / "other")
    equal(tensors(tmp_path / "one"), tensors(tmp_path / "other"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_value_residual=True), "without value_residual True"),
        (dict(model_mlp="experts"), "mlp experts"),
        (dict(model_positions="alibi"), "positions alibi"),
        (
            dict(model_positions="rotary", model_rotary_fraction=0.5, model_norm="rmsnorm", model_activation="swiglu"),
            "rotary.fraction 0.5",
        ),
        (dict(model_logit_softcap=30.0), "logit_softcap 30.0"),
        (dict(model_activation="geglu", model_use_bias=True), "activation geglu"),
    ],
)
def test_a_model_that_no_family_has_is_refused_with_the_reason(changes, words, tmp_path):
    with pytest.raises(ConfigError, match="no Hugging Face family is this model") as caught:
        convert_run.export_run(random_run(tmp_path, **changes), tmp_path / "hf")
    assert words in str(caught.value) and not (tmp_path / "hf").exists()


def test_a_window_that_holds_the_whole_context_is_none(tmp_path):
    run = random_run(tmp_path, **FAMILIES["llama"], model_windows="(16,20)")
    assert convert_run.export_run(run, tmp_path / "hf")["family"] == "llama"


def test_missing_surplus_and_misshapen_tensors_are_named_each(folder, tmp_path):
    found = tensors(folder)
    del found["transformer.h.0.ln_1.weight"], found["transformer.h.1.mlp.c_fc.bias"]
    found["transformer.wpe.weight"] = np.zeros((3, 16), "f")
    found["transformer.h.0.attn.c_attn.weight"] = found["transformer.h.0.attn.c_attn.weight"].astype("i4")
    found["transformer.h.7.ln_1.weight"] = np.zeros(16, "f")
    save_file(found, folder / "model.safetensors")
    message = refused(folder, tmp_path / "run")
    for words in (
        "transformer.h.0.ln_1.weight is missing",
        "transformer.h.1.mlp.c_fc.bias is missing",
        "transformer.wpe.weight has shape [3, 16] instead of [16, 16]",
        "transformer.h.0.attn.c_attn.weight is I32",
        "transformer.h.7.ln_1.weight is not part of the model",
    ):
        assert words in message, message


def test_the_bare_trunk_and_old_files_mask_buffers_are_read(folder, exported, tmp_path):
    found = {name.removeprefix("transformer."): value for name, value in tensors(folder).items()}
    found["h.0.attn.bias"] = np.ones((1, 1, 16, 16), bool)
    found["lm_head.weight"] = found["wte.weight"]  # a copy of what it is tied to
    save_file(found, folder / "model.safetensors")
    for source, target in ((folder, "one"), (exported, "other")):
        convert_run.import_run(str(source), tmp_path / target)
    equal(gptjax.load(tmp_path / "one").params, gptjax.load(tmp_path / "other").params)
    found["lm_head.weight"] = found["wte.weight"] + 1
    save_file(found, folder / "model.safetensors")
    assert "lm_head.weight differs from transformer.wte.weight, which" in refused(folder, tmp_path / "run")


def break_file(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are never loaded"),
        (lambda f: (f / "config.json").unlink(), "is no model's folder: it has no config.json"),
        (lambda f: break_file(f, "config.json", lambda t: t[:50]), "cannot be read"),
        (lambda f: break_file(f, "config.json", lambda t: t.replace('"gpt2"', '"mamba"')), "model_type=mamba"),
        (lambda f: break_file(f, "config.json", lambda t: t.replace('"n_layer"', '"layer_n"')), "lacks n_layer"),
        (
            lambda f: break_file(f, "config.json", lambda t: t.replace('"n_head": 2', '"n_head": 0')),
            "n_head is 0; it must be a whole number from 1",
        ),
        (
            lambda f: break_file(f, "config.json", lambda t: t.replace("{", '{"scale_attn_weights": false,', 1)),
            "scale_attn_weights=False is not supported",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "lacks b.safetensors",
        ),
        (lambda f: break_file(f, "config.json", lambda t: t.replace("260", "100")), "the tokenizer has 257 ids"),
    ],
)
def test_damaged_folders_are_refused_in_one_line_and_nothing_is_made(folder, damage, words, tmp_path):
    damage(folder)
    message = refused(folder, tmp_path / "run")
    assert words in message and "\n" not in message


def test_a_folder_without_a_tokenizer_needs_one_by_name(folder, tmp_path):
    for name in convert_run.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="has no tokenizer; name one"):
        convert_run.import_run(str(folder), tmp_path / "run")
    with pytest.raises(ConfigError, match="is made from a text"):
        convert_run.import_run(str(folder), tmp_path / "run", "bpe:300")
    convert_run.import_run(str(folder), tmp_path / "run", "bytes")
    assert gptjax.load(tmp_path / "run").tokenizer.name == "bytes"


@pytest.mark.slow
def test_an_imported_run_is_a_run_like_any_other(call, exported, text_file, tmp_path):
    """The model is converted, evaluated, trained in place, stopped early, resumed, and trained elsewhere."""
    workdir = tmp_path / "run"
    told = json.loads(call(convert, f"--from=hf:{exported}", f"--to={workdir}", "--json").out)
    assert told["family"] == "gpt2" and "exact" in told["tokenizer_kind"]
    before = gptjax.load(workdir).params
    assert call(generate, f"--workdir={workdir}", "--prompt=ab", "--max_tokens=3").code == 0
    assert json.loads(call(evaluate, f"--workdir={workdir}", "--data", text_file, "--json").out)["bits_per_byte"] > 8
    assert "was imported and has no held-out text" in call(evaluate, f"--workdir={workdir}").refusal()

    flags = [f for f in overrides(data_path=text_file, train_steps=4) if "model." not in f and "tokenizer" not in f]
    command = [train, f"--config={BASE}", *flags, "--config.optimizer.learning_rate=0.0"]
    other = tmp_path / "other"
    assert call(*command, f"--workdir={other}", f"--config.init_from={workdir}").code == 0
    equal(gptjax.load(other).params, before)
    assert gptjax.load(other).config.data.tokenizer == gptjax.load(workdir).tokenizer.name == "hf:gpt2"
    workdir.rename(tmp_path / "elsewhere")  # what a run began with is not needed to go on with it
    assert "is finished" in call(*command, f"--workdir={other}", f"--config.init_from={workdir}").err
    (tmp_path / "elsewhere").rename(workdir)
    assert call(*command, f"--workdir={workdir}").code == 0
    equal(gptjax.load(workdir).params, before)
    assert gptjax.load(workdir).config.train.steps == 4
    assert "is finished" in call(*command, f"--workdir={workdir}").err
    assert call(evaluate, f"--workdir={workdir}").code == 0
    refusal = call(*command, f"--workdir={workdir}", "--config.model.layers=3").refusal()
    assert "model.layers is decided by" in refusal


@pytest.mark.slow
def test_a_scanned_run_can_begin_with_an_unscanned_ones_parameters(exported, text_file, tmp_path):
    convert_run.import_run(str(exported), tmp_path / "run")
    recipe = tiny_config(data_path=text_file, train_steps=1, optimizer_learning_rate=0.0, model_scan_layers=True)
    recipe = recipe.copy_and_resolve_references()
    with recipe.unlocked():
        recipe.init_from = str(tmp_path / "run")
    run_training(recipe, tmp_path / "scanned")
    ids = np.arange(9)[None]
    one, other = gptjax.load(tmp_path / "run"), gptjax.load(tmp_path / "scanned")
    assert "blocks" in other.params
    np.testing.assert_allclose(one.logits(ids), other.logits(ids), atol=1e-4)


def test_convert_refuses_in_one_line(call, exported, trained, tmp_path):
    def refusal(*flags):
        return call(convert, *flags).refusal()

    assert "must begin with hf:" in refusal("--from=a", "--to=b")
    assert "must begin with hf:" in refusal("--from=hf:a", "--to=hf:b")
    assert "there is no folder ./a" in refusal("--from=hf:./a", f"--to={tmp_path / 'x'}")
    assert "--tokenizer is for --from=hf:" in refusal(f"--from={trained}", "--to=hf:b", "--tokenizer=gpt2")
    assert "--dtype is for --to=hf:" in refusal("--from=hf:a", "--to=b", "--dtype=bfloat16")
    assert "exists; give another --to" in refusal(f"--from=hf:{exported}", f"--to={trained}")
    assert "exists; give another --to" in refusal(f"--from={trained}", f"--to=hf:{exported}")
    assert "is not a run" in refusal(f"--from={tmp_path}", "--to=hf:b")


@pytest.mark.slow
def test_a_run_begins_with_a_hugging_face_folder_directly(call, exported, text_file, tmp_path):
    """The run contains the folder's model as a run, so it can be moved and does not need the folder."""
    folder, workdir = shutil.copytree(exported, tmp_path / "hf"), tmp_path / "runs" / "mine"
    flags = [f for f in overrides(data_path=text_file, train_steps=2) if "model." not in f and "tokenizer" not in f]
    tuned = ["--config.finetune.method=lora", "--config.finetune.rank=2"]
    command = [train, f"--config={BASE}", f"--config.init_from=hf:{folder}", *flags, *tuned]
    assert call(*command, f"--workdir={workdir}").code == 0
    assert [path.name for path in workdir.parent.iterdir()] == ["mine"]
    convert_run.import_run(str(exported), tmp_path / "converted")
    equal(gptjax.load(workdir / "base").params, gptjax.load(tmp_path / "converted").params)
    shutil.rmtree(folder)
    assert "is finished" in call(*command, f"--workdir={workdir}").err
    refusal = call(*command, f"--workdir={workdir}", "--config.finetune.rank=3").refusal()
    assert "belongs to another config: finetune.rank (2 there, 3 here)" in refusal
    there, ids = gptjax.load(workdir).logits(np.arange(9)[None]), np.arange(9)[None]
    moved = workdir.rename(tmp_path / "moved")
    np.testing.assert_array_equal(gptjax.load(moved).logits(ids), there)
    assert call(convert, f"--from={moved}", f"--to=adapter:{tmp_path / 'adapter'}").code == 0
    shutil.rmtree(moved / "base")
    assert "base is not a run" in call(generate, f"--workdir={moved}").refusal()


@pytest.mark.slow
def test_cut_short_it_goes_on_from_its_base_inside(exported, text_file, tmp_path, monkeypatch):
    recipe = tiny_config(data_path=text_file, train_steps=4, finetune_method="lora", finetune_rank=2)
    with recipe.unlocked():
        recipe.init_from, recipe.checkpoint.every_steps, recipe.log.every_steps = f"hf:{exported}", 2, 1

    def stop(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, tmp_path / "cut", on_line=stop)
    monkeypatch.setattr(convert_run, "import_run", None)  # it is converted once
    assert run_training(recipe, tmp_path / "cut")["steps"] == 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--config.init_from": "hf:./nowhere"}, "there is no folder"),
        ({"--config.train.steps": "0"}, "train.steps is 0; it must be at least 1"),
        ({"--config.finetune.method": "rule", "--config.finetune.rule": "x/y"}, "matches no parameter"),
        ({"--config.data.path": "nowhere.txt"}, "nowhere.txt"),
        ({"--config.model.layers": "3"}, "model.layers is decided by hf:"),
        ({"--workdir": "."}, "exists and is not a run"),
    ],
)
def test_what_cannot_begin_with_a_folder_leaves_nothing(
    call, exported, text_file, tmp_path, monkeypatch, changed, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("mine")
    flags = [f for f in overrides(data_path=text_file) if "model." not in f and "tokenizer" not in f]
    given = {"--config": BASE, "--workdir": "run", "--config.init_from": f"hf:{exported}"} | changed
    refusal = call(train, *flags, *(f"{flag}={value}" for flag, value in given.items())).refusal()
    assert told in refusal
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_a_folder_without_a_tokenizer_is_sent_to_convert(call, folder, tmp_path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    told = call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", f"--config.init_from=hf:{folder}").refusal()
    assert "has no tokenizer" in told and "python -m gptjax.convert --from=hf:" in told
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_importing_loads_no_torch_and_no_transformers(exported, tmp_path):
    code = (
        "import sys; from gptjax.interop import convert_run; from pathlib import Path\n"
        f"convert_run.import_run({str(exported)!r}, Path({str(tmp_path / 'run')!r}))\n"
        "assert not {'torch', 'transformers', 'pickle5'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
