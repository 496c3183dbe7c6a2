"""Masks filled in by an encoder, against its own forward pass."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import generate, tiny_config

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.specials import lookup_special_ids
from gptjax.runs import run
from gptjax.training import samples

BYTES = tokenizers.bytes_encoding()
MASK = lookup_special_ids(BYTES, ["mask"]).ids["mask"]


def made(tokenizer=BYTES, **changes):
    wild = {"model_arch": "encoder", "model_vocabulary": tokenizer.n_vocab + 3, "model_init_std": 0.5}
    config = tiny_config(**wild | changes)
    model = models.build(config.model)
    params = models.init(model, jax.random.key(0))
    return run.Run(Path("run"), config, model, params, tokenizer)


@pytest.mark.slow
def test_each_mask_is_filled_with_its_most_likely_token():
    of = made()
    filled = of.fill("ab [MASK]c<mask>", 4)
    ids = [*b"ab ", MASK, *b"c", MASK, 256]
    probability_TV = np.asarray(jax.nn.softmax(of.logits([ids])[0]))
    for place, mask in zip((3, 5), filled.masks, strict=True):
        expected = np.argsort(-probability_TV[place])[:4]
        assert [one.token for one in mask] == expected.tolist()
        np.testing.assert_allclose([one.probability for one in mask], probability_TV[place, expected], rtol=1e-4)
    first, second = (mask[0].text for mask in filled.masks)
    assert filled.text == f"ab {first}c{second}"


def test_the_space_before_a_word_is_in_its_token():
    words = tokenizers.bpe_encoding(["the sea is blue and the sky is blue " * 9], 270)
    (mask,) = made(words, model_context=32).fill("the sea is [MASK].", 3).masks
    assert len(mask) == 3
    ids = [*words.encode_ordinary("the sea is"), words.n_vocab, *words.encode_ordinary("."), words.end]
    expected = made(words, model_context=32).logits([ids])[0, -3].argmax()
    assert mask[0].token == expected


def test_the_command_prints_it(call, monkeypatch):
    of = made()
    monkeypatch.setattr(run, "load", lambda *_: of)
    filled = of.fill("a[MASK]", 2)
    assert call(generate, "--workdir=run", "--prompt=a[MASK]", "--top_k=2").out == filled.lines() + "\n"
    told = json.loads(call(generate, "--workdir=run", "--prompt=a[MASK]", "--top_k=2", "--json").out)
    assert told["masks"][0][0]["token"] == filled.masks[0][0].token and told["text"] == filled.text
    for flag in ("--temperature=1", "--chat", "--beams=2", "--max_tokens=3"):
        text = call(generate, "--workdir=run", "--prompt=a[MASK]", flag).refusal()
        assert text.startswith(flag.split("=")[0] + " is for models that write text")
    assert "the prompt has no mask" in call(generate, "--workdir=run", "--prompt=a").refusal()


def test_texts_that_cannot_be_filled_are_refused():
    with pytest.raises(DataError, match="the text has 18 tokens, and the model's context is 16"):
        made().fill("x" * 16 + "[MASK]")
    with pytest.raises(ConfigError, match="trained without masks"):
        made(model_vocabulary=257).fill("[MASK]")
    with pytest.raises(ConfigError, match="no encoder"):
        made(model_arch="gpt").fill("[MASK]")
    with pytest.raises(ConfigError, match="top_k is 0"):
        made().fill("[MASK]", 0)


@pytest.mark.parametrize(
    "prompt, begins", [("a[MASK]b", "a"), ("ab", ""), ("[MASK]" * 20, "no sample: the text has 21 tokens")]
)
def test_a_runs_sample_has_its_masks_filled_in(prompt, begins):
    of = made()
    config = tiny_config(model_arch="encoder", sample_prompt=prompt)
    parts = SimpleNamespace(model=of.model)
    setup = SimpleNamespace(config=config, parts=parts, data=SimpleNamespace(tokenizer=BYTES))
    text = samples.sample(setup, of.params)
    assert text.startswith(begins) and bool(text) == bool(begins)
    if begins == "a":
        assert text == of.fill(prompt).lines()
