"""Hugging Face configs: defaults and logits equal transformers', and unsupported configs are refused in one line."""

import copy
import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import gptjax
from gptjax import convert, models
from gptjax.config.errors import DataError, UserError
from gptjax.interop import convert_run, families, hf_config

torch = pytest.importorskip("torch", reason="needs torch (the parity extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

# Fields of transformers' classes that change no logits, by the reason; every other one must be read or refused.
NO_EFFECT = {
    "training only": (
        "attention_dropout attn_pdrop embd_pdrop embed_dropout classifier_dropout activation_dropout encoder_layerdrop "
        "decoder_layerdrop attention_probs_dropout_prob problem_type initializer_factor"
    ),
    "ids, which the tokenizer and decoding read": "bos_token_id eos_token_id pad_token_id forced_eos_token_id",
    "of transformers' own running": (
        "use_cache output_hidden_states return_dict dtype chunk_size_feed_forward transformers_version "
        "reorder_and_upcast_attn pretraining_tp"
    ),
    "names": "id2label label2id architectures",
    "of heads that gptjax does not read": (
        "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout"
    ),
}
NAMES = {name for names in NO_EFFECT.values() for name in names.split()}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_field_of_transformers_class_is_known_and_has_its_default(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
    keys = families.FAMILIES[family].keys
    assert fields.keys() - NAMES <= keys.keys(), "a new field: read it, refuse it or say why it changes nothing"
    same = {name: keys[name].default for name in fields.keys() & keys.keys()}
    assert same == {name: fields[name] for name in same}
    for name, key in keys.items():
        if key.fixed:
            with pytest.raises(DataError, match=f"{name}=other is not supported"):
                hf_config.read({name: "other"}, keys)


def both(folder):
    """Returns gptjax's logits or error, and transformers' logits or None if it does not accept the folder."""
    ids = (np.arange(24)[None] * 7) % 290
    try:
        family, model = convert_run.read_model(folder)
        params = convert_run.read_params(folder, family, model)
        ours = np.asarray(models.logits(models.build(model), params, ids))
    except UserError as error:
        assert "\n" not in str(error)
        return error, None
    try:
        theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        if any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return ours, None
        with torch.no_grad():
            return ours, theirs.eval()(torch.tensor(ids)).logits.numpy()
    except Exception:  # of transformers, of many kinds
        return ours, None


RIGHT = (
    "rope_llama3_nooriginal", "rope_theta_inside_rope_scaling", "rope_parameters_without_theta", "mistral_layer_types",
    "mistral_kv_heads_default", "qwen3_head_dim_default",
)  # fmt: skip
REFUSED = {
    "rope_linear_without_factor": "rope_scaling of type linear lacks factor",
    "rope_llama3_without_low_high": "rope_scaling of type llama3 lacks low_freq_factor, high_freq_factor",
    "hf_config_deep_nesting": "nested too deeply",
    "hf_config_factor_string": "rope_scaling: factor is '4'",
    "hf_config_model_type_list": "model_type=['gpt2'] is not supported",
    "hf_config_nan": "n_embd is nan",
    "hf_config_null_initializer_range": "initializer_range is null",
    "hf_config_wrong_types": "num_hidden_layers is '2'",
    "hf_config_zero_heads": "num_attention_heads is 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT)
def test_a_config_that_failed_once_gives_transformers_logits(case):
    ours, theirs = both(shared(f"cases/{case}"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_is_refused_by_its_key(case, call, tmp_path):
    folder = shared(f"cases/{case}")
    told = call(convert, f"--from=hf:{folder}", f"--to={tmp_path / 'run'}", "--tokenizer=bytes").refusal()
    assert REFUSED[case] in told and not list(tmp_path.iterdir())


@functools.cache
def example(case):
    folder = shared(f"cases/{case}")
    return folder, json.loads((folder / "config.json").read_text())


VALUES = st.sampled_from(
    [None, "x", "2", [], [1], {}, True, False, math.nan, math.inf, -1, 0, 1, 2, 10**20, 1e300, 0.5]
)


@st.composite
def mutations(draw):
    """A case's config with one key, also of its rope, changed or removed."""
    case = draw(st.sampled_from(["pb_llama", "pb_gpt2", "mistral_layer_types", "qwen3_head_dim_default"]))
    config = copy.deepcopy(example(case)[1])
    at = draw(st.sampled_from([one for one in (config, config.get("rope_parameters")) if one]))
    key = draw(st.sampled_from(sorted(at)))
    if draw(st.booleans()):
        del at[key]
    else:
        at[key] = draw(VALUES)
    return case, config


def hold(tmp_path_factory, mutation):
    case, config = mutation
    folder = tmp_path_factory.mktemp("hf") / "hf"
    shutil.copytree(example(case)[0], folder)
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = both(folder)
    if theirs is not None:
        np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=str(config))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(mutations())
def test_a_changed_config_gives_transformers_logits_or_one_line(tmp_path_factory, mutation):
    hold(tmp_path_factory, mutation)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations())
def test_many_changed_configs(tmp_path_factory, mutation):
    hold(tmp_path_factory, mutation)


@pytest.mark.slow
def test_several_end_ids_end_a_text_as_in_transformers(call, tmp_path):
    folder = shared("cases/eos_list")
    assert call(convert, f"--from=hf:{folder}", f"--to={tmp_path / 'run'}").code == 0
    run = gptjax.load(tmp_path / "run")
    assert {run.tokenizer.end, *run.tokenizer.stop_token_ids} == {1, 2}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [5, 6, 7]
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    again = run.generate(ids, temperature=0, max_tokens=40).ids
    assert list(again) == found


@pytest.mark.slow
def test_wrapped_names_are_read_and_git_lfs_pointers_are_told(tmp_path):
    folder = shutil.copytree(shared("cases/pb_llama"), tmp_path / "hf")
    plain = both(folder)[0]
    tensors = load_file(folder / "model.safetensors")
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
        family, model = convert_run.read_model(folder)
        params = convert_run.read_params(folder, family, model)
        ids = (np.arange(24)[None] * 7) % 290
        np.testing.assert_array_equal(models.logits(models.build(model), params, ids), plain)
    save_file(tensors | {f"module.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    assert "has a duplicate of" in str(both(folder)[0])
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert f"{name} is a Git LFS pointer" in str(both(folder)[0])
