"""adapter_config.json: supported adapters give peft's logits; the others are refused in one line that names the key."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gptjax
from gptjax import convert
from gptjax.config.errors import DataError
from gptjax.interop import convert_run, peft_config
from gptjax.interop import peft as adapters

torch = pytest.importorskip("torch", reason="needs torch (the parity extra)")
peft = pytest.importorskip("peft", reason="needs peft (the parity extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

IDS = (np.arange(12)[None] * 7) % 290
REFUSED = {
    "peft_pissa": "init_lora_weights=pissa is not supported",
    "peft_alora": "alora_invocation_tokens=[5, 6] is not supported",
    "peft_alpha_missing": "lacks lora_alpha",
    "peft_r_missing": "lacks r",
    "peft_r_null": "r is None",
    "peft_r_zero": "r is 0",
    "peft_cfg_list": "holds no object",
    "peft_r_differs_from_tensors": "lora_A.weight of shape [4, 64] instead of [8, 64]",
    "peft_empty_tensors": "it has no tensors",
    "peft_ab_swapped_shape": "lora_B.weight of shape [4, 64] instead of [64, 4]",
    "peft_one_dim": "lora_B.weight of shape [256] instead of [64, 4]",
    "peft_lacks_A_one": "lacks model.layers.0.self_attn.v_proj.lora_A.weight",
    "peft_wrong_base_bigger": "lora_A.weight of shape [4, 64] instead of [4, 128]",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Returns `bases(name)`: the run directory of a case's base."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp("bases") / name
        convert_run.import_run(str(shared(f"cases/{name}")), folder, "bytes")
        return folder

    return made


def theirs(base, adapter):
    """Returns peft's logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(shared(f"cases/{base}"))
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_failed_once_is_refused_in_one_line(case, bases, call, tmp_path):
    base = bases("pb_llama_big" if case.endswith("bigger") else "pb_llama")
    flags = [f"--from=peft:{shared(f'cases/{case}')}/adapter", f"--base={base}", f"--to={tmp_path / 'run'}", "--merge"]
    assert REFUSED[case] in call(convert, *flags).refusal()
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
@pytest.mark.parametrize(("case", "base"), [("peft_alpha_pattern", "pb_llama"), ("peft_alpha_pattern_gpt2", "pb_gpt2")])
def test_alpha_by_module_gives_pefts_logits(case, base, bases, call, tmp_path):
    adapter, run = shared(f"cases/{case}") / "adapter", bases(base)
    assert call(convert, f"--from=peft:{adapter}", f"--base={run}", f"--to={tmp_path / 'run'}", "--merge").code == 0
    expected = theirs(base, adapter)
    np.testing.assert_allclose(gptjax.load(tmp_path / "run").logits(IDS), expected, atol=1e-4)
    adapted = adapters.load(gptjax.load(run), adapter)
    np.testing.assert_allclose(adapted.logits(IDS), expected, atol=1e-4)
    adapters.save(adapted, tmp_path / "again")  # where queries and values are one module, of more ranks
    np.testing.assert_allclose(theirs(base, tmp_path / "again"), expected, atol=1e-4)


@pytest.mark.parametrize("stabilised", [False, True])
def test_rank_and_alpha_by_module_give_pefts_logits(stabilised, bases, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(shared("cases/pb_llama"))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 1}, use_rslora=stabilised,
        alpha_pattern={r"layers\.0.*_proj": 7, "v_proj": 2}, exclude_modules=["layers.0.mlp.down_proj"],
        layers_to_transform=[0, 1], task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapted = adapters.load(gptjax.load(bases("pb_llama")), tmp_path / "adapter")
    np.testing.assert_allclose(adapted.logits(IDS), theirs("pb_llama", tmp_path / "adapter"), atol=1e-4)


def test_every_field_of_pefts_config_is_known():
    """Every field is supported, without effect, or refused by name; a new field of peft fails this test."""
    known = {*peft_config.SUPPORTED, *(key for keys in peft_config.NO_EFFECT.values() for key in keys)}
    refused = {
        "modules_to_save", "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens",
        "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora",
        "arrow_config", "kasa_config",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == known | refused
    facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["x"]}
    for name in [*refused, "a_key_of_tomorrow"]:
        peft_config.read(facts | {name: None}, "file")
        with pytest.raises(DataError, match=f"{name}=.* is not supported"):
            peft_config.read(facts | {name: ["y"]}, "file")
    for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", 3):
        with pytest.raises(DataError, match=f"init_lora_weights={name} is not supported"):
            peft_config.read(facts | {"init_lora_weights": name}, "file")
    with pytest.raises(DataError, match="bias=all is not supported"):
        peft_config.read(facts | {"bias": "all"}, "file")


def changed(tmp_path, change):
    """Returns a copy of a case's adapter with other tensors."""
    folder = shutil.copytree(shared("cases/peft_alpha_pattern") / "adapter", tmp_path / "adapter")
    change(folder, load_file(folder / "adapter_model.safetensors"))
    return folder


HEAD = "base_model.model.lm_head.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f, t: save_file(t | {HEAD: np.zeros((4, 64), "f")}, f / adapters.TENSORS),
            "not on embeddings and heads",
        ),
        (lambda f, t: save_file(t | {EMBEDDING: np.zeros((4, 9), "f")}, f / adapters.TENSORS), "LoRA on an embedding"),
        (
            lambda f, t: save_file({k.replace("v_proj", "w_proj"): v for k, v in t.items()}, f / adapters.TENSORS),
            "w_proj, which",
        ),
        (lambda f, t: (f / adapters.TENSORS).rename(f / "adapter_model.bin"), "never loaded"),
        (
            lambda f, t: (f / adapters.TENSORS).write_text("version https://git-lfs.github.com/spec/v1"),
            "Git LFS pointer",
        ),
        (lambda f, t: save_file({k: v.astype("i4") for k, v in t.items()}, f / adapters.TENSORS), "which is I32"),
    ],
)
def test_other_tensors_are_refused_with_the_reason(change, words, bases, tmp_path):
    folder = changed(tmp_path, change)
    with pytest.raises(DataError) as caught:
        adapters.load(gptjax.load(bases("pb_llama")), folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


VALUES = st.sampled_from(
    [None, "x", "v_proj", "(", [], ["q_proj"], [0], {}, {"x": 1}, True, False, -1, 0, 2, 10**20, 0.5]
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(sorted(field.name for field in dataclasses.fields(peft.LoraConfig))), VALUES)
def test_a_changed_config_gives_pefts_logits_or_one_line(bases, tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    shutil.copytree(shared("cases/peft_alpha_pattern") / "adapter", folder)
    facts = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(facts | {key: value}))
    try:
        ours = adapters.load(gptjax.load(bases("pb_llama")), folder).logits(IDS)
    except DataError as error:
        assert "\n" not in str(error)
        return
    try:
        expected = theirs("pb_llama", folder)
    except Exception:  # peft's own refusals, of many kinds
        return
    np.testing.assert_allclose(ours, expected, atol=1e-4, err_msg=f"{key}={value}")
