"""Generation: against a plain loop, whole characters, seeds, limits, and the command."""

import json

import jax
import numpy as np
import pytest
from conftest import generate

import gptjax
from gptjax.config import ConfigError, DataError
from gptjax.decode import generate as decoding


@pytest.fixture(scope="module")
def run(trained):
    return gptjax.load(trained)


def test_windows_are_padded_to_few_lengths_and_never_cut():
    lengths = {length: decoding.padded(length, 1000) for length in range(1, 1001)}
    assert all(length <= read <= 1000 for length, read in lengths.items())
    assert set(lengths.values()) == {128, 256, 512, 1000} and decoding.padded(3, 16) == 16


def test_greedy_equals_a_plain_loop_past_the_context(run):
    ids, context = list(run.tokenizer.encode_ordinary("the model")), run.config.model.context
    sample = run.generate("the model", max_tokens=30, temperature=0)
    for token, logprob in zip(sample.ids, sample.logprobs, strict=True):
        logits = run.logits(np.array([ids[-context:]]))[0, -1]
        assert token == logits.argmax()
        assert logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token]), abs=1e-4)
        ids.append(token)
    assert len(sample.ids) == 30 or sample.ids[-1] == 256


def test_seeds_decide(run):
    texts = [run.generate("the", max_tokens=20, temperature=1.0, seed=seed, index=i).text for seed, i in
             ((1, 0), (1, 0), (2, 0), (1, 1))]  # fmt: skip
    assert texts[0] == texts[1] and len(set(texts)) == 3


def scripted(run, script):
    """A speaker that says what the script says."""
    return decoding.Speaker(lambda *args: (np.int32(next(script)), np.float32(0)), None, run.tokenizer, 16)


def test_text_comes_in_whole_characters(run):
    """Bytes of a character arrive as several tokens; what cannot be a character becomes U+FFFD at the end."""
    script = iter("aé再🤖".encode() + b"\xe5\x86")
    pieces = []
    sample = decoding.generate(scripted(run, script), "x", decoding.Settings(12), jax.random.key(0), pieces.append)
    assert sample.text == "aé再🤖\ufffd" == "".join(pieces)
    assert [p for p in pieces if p] == ["a", "é", "再", "🤖", "\ufffd"]


def test_generation_ends_at_end_of_text(run):
    speaker = scripted(run, iter([97, 256, 98]))
    assert decoding.generate(speaker, "x", decoding.Settings(9), jax.random.key(0)).ids == [97, 256]


def test_the_command_streams_text_and_prints_objects(trained, call):
    flags = [f"--workdir={trained}", "--prompt=the ", "--max_tokens=9", "--seed=1", "--samples=2"]
    plain, objects = call(generate, *flags), call(generate, *flags, "--json")
    samples = [json.loads(line) for line in objects.out.splitlines()]
    assert plain.out == "\n\n".join("the " + s["text"] for s in samples) + "\n"
    assert [s["index"] for s in samples] == [0, 1] and all(len(s["ids"]) == len(s["logprobs"]) for s in samples)
    assert all(p <= 0 for s in samples for p in s["logprobs"])


@pytest.mark.parametrize(
    "settings, error, expected",
    [
        ({"temperature": -1}, ConfigError, "temperature is -1; it must be at least 0"),
        ({"temperature": float("nan")}, ConfigError, "temperature is nan"),
        ({"max_tokens": 0}, ConfigError, "max_tokens is 0"),
        ({"top_k": -3}, ConfigError, "top_k is -3"),
        ({"prompt": "x" * 17}, DataError, "the prompt has 17 tokens, more than the model's context of 16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(run, settings, error, expected):
    with pytest.raises(error, match=expected):
        run.generate(**{"prompt": "x"} | settings)


def test_an_empty_prompt_begins_a_document(run):
    assert run.generate("", max_tokens=3).ids
