"""The engine: independent rows of one batch, compared with an uncached forward pass over the whole text."""

import os
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_RUN, ROOT, tiny_config

from gptjax import models
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import engine, prefill, speculative, step
from gptjax.decode import generate as decoding
from gptjax.decode.drafting import SpeculativeConfig
from gptjax.decode.generate import GenerationConfig, Request
from gptjax.decode.settings import SamplingParams

ALPHABET = "".join(map(chr, range(32, 97)))
GREEDY = SamplingParams(temperature=0)
CHARS = tokenizers.chars_encoding([ALPHABET])  # without an end token: texts are as long as they may be
BYTES = tokenizers.bytes_encoding()
LONG = {"model_context": 520, "model_vocabulary": len(ALPHABET)}
KINDS = {
    "learned": {},
    "sinusoidal": {"model_positions": "sinusoidal"},
    "rotary": {
        "model_positions": "rotary",
        "model_rotary.scaling": "llama3",
        "model_rotary.llama3.original_context": 100,
    },
    "windows": {"model_positions": "rotary", "model_windows": "(33, 0)", "model_kv_heads": 1, "model_qk_norm": "head"},
    "alibi": {"model_positions": "alibi", "model_norm_position": "post", "model_value_residual": True},
    "none": {"model_positions": "none", "model_scan_layers": True},
    "experts": {"model_positions": "rotary", "model_mlp": "experts", "model_experts": 4},
}


@cache
def _generator(changes, tokenizer):
    config = tiny_config(**{"model_init_std": 0.5, "model_tied_head": False} | dict(changes))
    model = models.build(config.model)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    return decoding.generator(model, params, tokenizer, config.model.context)


def generator(tokenizer=CHARS, **changes):
    """A generator of a tiny model with large random weights, so that its texts do not repeat themselves."""
    changes = {"model_vocabulary": tokenizer.n_vocab} | changes
    return _generator(tuple(sorted(changes.items())), tokenizer)


def request(prompt, seed=0, **settings):
    return Request(prompt, SamplingParams(**settings), jax.random.key(seed))


def answers(of, requests, **generation):
    """Returns the samples in the order of the requests."""
    found = dict(decoding.generate(of, requests, GenerationConfig(**generation)))
    assert len(found) == len(requests)
    return [found[number] for number in range(len(requests))]


def uncached(of, ids, **changes):
    """Logits after each id, of one forward pass without a cache; `changes` of `config.model`."""
    config = models.ConfigDict(of.decoder.model.config)
    config.update(changes)
    model = models.build(config)
    return np.asarray(jax.jit(partial(models.logits, model))(of.decoder.params, np.array([ids], np.int32))[0])


def check_sample(logits_TV, prompt, sample, tolerance=1e-4):
    """Asserts that the sample's ids are the greedy ones, and its log-probabilities those of the logits."""
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))[len(prompt) - 1 :]
    assert logprobs_TV.argmax(-1)[: len(sample.ids)].tolist() == sample.ids
    chosen = logprobs_TV[np.arange(len(sample.ids)), sample.ids]
    np.testing.assert_allclose(sample.logprobs, chosen, atol=tolerance)


OFTEN = ("learned", "windows")  # the others are slow ones: each is a program of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in OFTEN else pytest.mark.slow) for kind in KINDS]
)
def test_five_hundred_greedy_tokens_equal_the_uncached_forward(kind):
    of, prompt = generator(**LONG | KINDS[kind]), tuple(range(3, 21))
    (sample,) = answers(of, [request(prompt, temperature=0, max_tokens=500)])
    assert len(sample.ids) == 500 and sample.finish == "length"
    if kind in ("learned", "rotary", "experts"):
        assert len(set(sample.ids[-100:])) > 3, "a text that repeats itself would hide a lost token"
    check_sample(uncached(of, [*prompt, *sample.ids]), prompt, sample)


BATCH = [
    request("THE", seed=0, max_tokens=40),
    request("$" * 30, seed=1, temperature=0, max_tokens=25),
    request("A LONGER PROMPT, " * 5, seed=2, temperature=1.3, top_k=0, top_p=0.9, max_tokens=33),
    request("0", seed=3, temperature=0.7, top_k=5, frequency_penalty=0.5, presence_penalty=0.2, max_tokens=3),
    request("BIAS", seed=4, logit_bias={5: 3.0, 7: -2.0}, repetition_penalty=1.4, max_tokens=40),
    request("BIAS", seed=5, min_p=0.05, no_repeat_ngram=2, typical_p=0.8, max_tokens=40),
    request("X" * 70, seed=6, top_k=64, stop=("A",), max_tokens=40),
]  # fmt: skip


@pytest.mark.slow
def test_rows_of_different_prompts_and_settings_and_more_requests_than_rows():
    of = generator(model_context=128)
    together = answers(of, BATCH, batch_size=3, max_length=128)
    assert [len(sample.ids) for sample in together[:6]] == [40, 25, 33, 3, 40, 40]
    assert together == [answers(of, [one], batch_size=3, max_length=128)[0] for one in BATCH]
    check_sample(uncached(of, [*CHARS.encode_ordinary("$" * 30), *together[1].ids]), [0] * 30, together[1])
    grams = list(zip(together[5].ids, together[5].ids[1:], strict=False))
    assert len(set(grams)) == len(grams)


MANY = [
    request(
        CHARS.decode([(7 * n + i) % 65 for i in range(1 + 5 * n)]), seed=n, temperature=n % 3 / 2, max_tokens=20 + n
    )
    for n in range(14)
]


def check_bits(**changes):
    """Asserts that each row is the same, bit for bit, alone and among 15 others."""
    of = generator(model_context=256, model_width=64, model_heads=4, **changes)
    others = [*BATCH[:1], request("L" * 120, seed=9, max_tokens=100, top_p=0.9, top_k=0)]
    together = answers(of, [*MANY, *others], batch_size=16, max_length=256)
    for n in (0, 3, 4, 13):
        alone = answers(of, [MANY[n]], batch_size=16, max_length=256)[0]
        assert alone == together[n], f"row {n}"
        shifted = answers(of, [*MANY[n:], *MANY[:n]], batch_size=16, max_length=256)[0]
        assert shifted == together[n], f"row {n} in another place"


@pytest.mark.slow
def test_a_row_is_the_same_bit_for_bit_alone_and_among_fifteen_others():
    check_bits(model_positions="rotary", model_windows="(9, 0)")


@pytest.mark.parametrize(
    "changes", [{"model_positions": "rotary"}, pytest.param({"model_mlp": "experts"}, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_it_is_the_same_bit_for_bit_in_optimised_programs(changes):
    here = AS_USERS_RUN | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    script = f"import test_engine; test_engine.check_bits(**{changes})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, check=False, env=os.environ | here, cwd=ROOT / "tests" / "decode", capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.fixture
def chunks(monkeypatch):
    """A list of the ids of each prefilled chunk."""
    read, extend = [], prefill.extend

    def counted(model, params, ids_BT, cache, count_B):
        read.append(np.asarray(ids_BT)[0, : int(count_B[0])].tolist())
        return extend(model, params, ids_BT, cache, count_B)

    monkeypatch.setattr(prefill, "extend", counted)
    return read


@pytest.mark.slow
def test_samples_of_one_prompt_prefill_it_once(chunks):
    of, prompt = generator(model_context=256), tuple(range(60)) * 2
    samples = answers(of, [request(prompt, seed=n, temperature=1.0, max_tokens=10) for n in range(5)], batch_size=2)
    assert [token for piece in chunks for token in piece] == list(prompt[:-1])
    assert len({tuple(sample.ids) for sample in samples}) == 5


@pytest.mark.slow
def test_a_cached_prefix_gives_the_same_bits(chunks):
    of, begin = generator(model_context=256), tuple(i % 60 for i in range(150))
    requests = [request(begin + tail, max_tokens=8) for tail in ((1, 2, 3), (9,) * 20, (5,))] + [request(begin[:100])]
    together = answers(
        of, [one._replace(sampling_params=SamplingParams(max_tokens=8)) for one in requests], batch_size=1
    )
    # The last goes on from 64 tokens of one that is longer: 100 is no whole number of chunks.
    assert [len(piece) for piece in chunks] == [64, 64, 24, 22 + 19, 22, 35]
    for one, sample in zip(requests, together, strict=True):
        fresh = answers(of, [one._replace(sampling_params=SamplingParams(max_tokens=8))], batch_size=1)
        assert fresh[0] == sample


@pytest.mark.parametrize("positions", ["rotary", "alibi"])
@pytest.mark.slow
def test_a_sliding_text_is_that_of_a_model_with_windows(positions):
    """A window in each layer: the texts of the uncached model, far past the context, prompts longer than it too."""
    of = generator(model_context=24, model_positions=positions, model_windows="(0, 5)")
    for prompt in ((1, 2, 3), tuple(i * i % 61 for i in range(90))):
        (sample,) = answers(of, [request(prompt, temperature=0, max_tokens=150)], sliding_context=True)
        assert sample.finish == "length"
        logits = uncached(of, [*prompt, *sample.ids], windows=(24, 5), context=300)
        check_sample(logits, prompt, sample)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 23, 24, 70])
def test_with_a_table_of_positions_the_newest_half_is_read_again(length):
    of = generator(model_context=24)
    prompt = tuple(i * i % 61 for i in range(length))
    (sample,) = answers(of, [request(prompt, temperature=0, max_tokens=80)], sliding_context=True)
    logits = jax.jit(lambda ids: models.logits(of.decoder.model, of.decoder.params, ids))
    ids, begin = list(prompt), 0 if length < 24 else length - 12
    for token, logprob in zip(sample.ids, sample.logprobs, strict=True):
        read = ids[begin:]
        row = np.zeros((1, 24), np.int32)
        row[0, : len(read)] = read
        logprobs = jax.nn.log_softmax(logits(row)[0, len(read) - 1])
        assert token == logprobs.argmax() and abs(logprob - logprobs[token]) < 1e-4
        ids.append(token)
        if len(read) == 24:
            begin = len(ids) - 12
    assert len(sample.ids) == 80 and sample.finish == "length"


@pytest.mark.slow
def test_reasons_why_texts_end():
    of, prompt = generator(BYTES, model_vocabulary=300), "0123456789"
    soon = dict(temperature=0, max_tokens=20)
    requests = [
        request(prompt, **soon, logit_bias={65: 1000.0}),
        request(prompt, **soon, logit_bias={256: 1000.0}),
        request(prompt, **soon, logit_bias={256: 1000.0}, min_tokens=3),
        request(prompt, temperature=0, max_tokens=2, logit_bias={65: 1000.0}),
        request("0", **soon, logit_bias={299: 1000.0}),
    ]
    full, ended, later, cut, nothing = answers(of, requests, batch_size=2)
    assert full.finish == "context" and len(full.ids) == 16 - len(prompt)
    assert (ended.finish, ended.ids, ended.text) == ("end", [256], "")
    assert (later.finish, len(later.ids), later.ids[-1]) == ("end", 4, 256)
    assert (cut.finish, cut.text) == ("length", "AA")
    assert (nothing.finish, nothing.ids, nothing.text) == ("end", [299], ""), "no token of the tokenizer"


@pytest.mark.slow
def test_a_stop_string_across_tokens_ends_the_text():
    of = generator(model_context=64)
    chunks, (whole,) = [], answers(of, [request("HELLO", temperature=0, max_tokens=40)])
    stop = whole.text[20:24]
    at = whole.text.index(stop)
    asked = request("HELLO", temperature=0, max_tokens=40, stop=(stop, "not in it"))
    for stride in (1, 3, 64):
        chunks.clear()
        ((_, sample),) = decoding.generate(of, [asked], GenerationConfig(), lambda _, text: chunks.append(text), stride)
        assert sample.finish == "stop" and sample.text == whole.text[:at] == "".join(chunks)
        assert sample.ids == whole.ids[: at + 4] and len(sample.logprobs) == at + 4


def test_the_most_likely_ids_at_each_position():
    of, prompt = generator(model_context=64), (3, 1, 4)
    (sample,) = answers(of, [request(prompt, max_tokens=20)], alternatives=3)
    logprobs = np.asarray(jax.nn.log_softmax(uncached(of, [*prompt, *sample.ids])))[2:-1]
    assert [[token for token, _ in place] for place in sample.alternatives] == [
        np.argsort(-row, kind="stable")[:3].tolist() for row in logprobs
    ]
    np.testing.assert_allclose(
        [[logprob for _, logprob in place] for place in sample.alternatives], -np.sort(-logprobs)[:, :3], atol=1e-4
    )


def compiled():
    """Returns the number of compiled programs."""
    functions = (step.decode_steps, prefill.extend, engine.insert, speculative.run_rounds)
    return [function._cache_size() for function in functions]


@pytest.mark.slow
def test_a_run_of_texts_is_one_program():
    """Its state is one kind of argument from the first dispatch on, wherever the parameters came from."""
    of = generator(model_context=128)
    here = jax.device_put(of.decoder.params, jax.devices()[0])
    for params, rows in ((of.decoder.params, 5), (here, 6)):
        before = compiled()
        requests = [request((1, 2, 3), seed=n, max_tokens=40 + n) for n in range(7)]
        same = of._replace(decoder=of.decoder._replace(params=params))
        assert (
            len(list(decoding.generate(same, requests, GenerationConfig(batch_size=rows, max_length=100), stride=9)))
            == 7
        )
        assert [now - then for now, then in zip(compiled(), before, strict=True)][::2] == [1, 1], rows


@pytest.mark.slow
@pytest.mark.parametrize("generation", [{}, {"speculation": SpeculativeConfig(3, ngram=2)}])
def test_nothing_is_compiled_after_the_first_time(generation):
    of = generator(model_context=128)

    def requests(first, **settings):
        return [request(tuple(range(first, first + n)), seed=first, max_tokens=20, **settings) for n in (3, 14, 30, 40)]

    answers(of, requests(0, top_k=3, logit_bias={3: 1.0, 4: 2.0}), batch_size=2, **generation)
    before = compiled()
    answers(of, requests(9, top_k=7, logit_bias={5: 0.5, 6: -1.0}, temperature=1.7), batch_size=2, **generation)
    answers(
        of,
        [*requests(2, top_k=9, logit_bias={1: 1.0, 9: 2.0}), *requests(1, top_k=2, logit_bias={2: 1.0, 8: 1.0})],
        batch_size=2,
        **generation,
    )
    assert compiled() == before


@pytest.mark.slow
def test_prompts_shorter_than_a_chunk():
    """Chunks have few lengths; a table of positions may be shorter than the next of them."""
    of = generator(model_context=21)
    (sample,) = answers(of, [request(tuple(range(20)), temperature=0)])
    assert sample.finish == "context"
    check_sample(uncached(of, [*range(20), *sample.ids]), range(20), sample)


def test_no_requests_give_no_samples():
    assert list(decoding.generate(generator(), [])) == []
