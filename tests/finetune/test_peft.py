"""LoRA in peft's format: exported adapters give the same logits in peft, and peft's are read alike."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from ml_collections import ConfigDict

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods, paths
from gptjax.interop import convert_run
from gptjax.interop import peft as ours
from gptjax.runs.run import Run

torch = pytest.importorskip("torch", reason="needs torch (the parity extra)")
peft = pytest.importorskip("peft", reason="needs peft (the parity extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

sys.path.append(str(ROOT / "tests" / "golden"))

FAMILIES = ("gpt2", "gpt_neo", "llama", "qwen2")
IDS = np.random.default_rng(0).integers(0, 30, (2, 7))


@pytest.fixture(scope="module", params=FAMILIES)
def base(request):
    """(a run of a family's golden model, transformers' own)."""
    folder = ROOT / "tests" / "golden" / "hf" / request.param
    family, model = convert_run.read_model(folder)
    params = convert_run.read_params(folder, family, model)
    config = tiny_config()
    with config.unlocked():
        config.model = ConfigDict({key: value for key, value in model.items() if key != "objective"})
    run = Run(folder, config, models.build(config.model), params, tokenizers.bytes_encoding())
    return run, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tuned(run, method, **options):
    """The run with LoRA parameters as after training."""
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.finetune.update(method=method, rank=3, **options)
    model = methods.build_model(config)
    fresh, frozen = methods.partition(run.params, config, jax.random.key(0), run.params)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype("f"), fresh)
    return dataclasses.replace(run, config=config, model=model, params=paths.union(frozen, moved))


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stabilised"), [("lora", False), ("lora", True), ("dora", False)])
def test_peft_gives_the_same_logits(base, tmp_path, method, stabilised):
    run, theirs = base
    adapted = tuned(run, method, rank_stabilised=stabilised)
    ours.save(adapted, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    found = logits_of(loaded)
    loaded.unload()
    assert np.abs(found - run.logits(IDS)).max() > 1e-2
    np.testing.assert_allclose(adapted.logits(IDS), found, atol=1e-4, rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_peft_saves_is_read_and_our_own_comes_back(base, tmp_path, method):
    run, theirs = base
    names = {"gpt2": ["c_attn", "c_fc"], "gpt_neo": ["q_proj", "v_proj"]}
    targets = names.get(theirs.config.model_type, ["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, use_dora=method == "dora", task_type="CAUSAL_LM",
        fan_in_fan_out=theirs.config.model_type == "gpt2", init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(theirs, settings).eval()
    found = logits_of(model)
    model.save_pretrained(tmp_path / "theirs")
    model.unload()
    adapted = ours.load(run, tmp_path / "theirs")
    np.testing.assert_allclose(adapted.logits(IDS), found, atol=1e-4, rtol=1e-4)
    mine = tuned(run, method)
    ours.save(mine, tmp_path / "mine")
    again = ours.load(run, tmp_path / "mine")
    for path, leaf in paths.flat(mine.params).items():
        np.testing.assert_allclose(paths.flat(again.params)[path], leaf, atol=1e-6, err_msg=path)


def test_what_cannot_be_is_refused(base, tmp_path):
    run, _ = base
    with pytest.raises(ConfigError, match="was tuned by ia3"):
        ours.save(tuned(run, "ia3"), tmp_path / "x")
    with pytest.raises(DataError, match="it has no adapter_config.json"):
        ours.read(run, tmp_path)
    ours.save(tuned(run, "lora"), tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(facts | {"peft_type": "IA3"}))
    with pytest.raises(DataError, match="is no LoRA adapter"):
        ours.read(run, tmp_path / "adapter")
