"""Encoder-decoders through the same engine and searches, against forward passes without a cache."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import generate, tiny_config
from test_beam import reference, same

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import beam, engine, prefill, prompts, step
from gptjax.decode import generate as decoding
from gptjax.decode.beam import BeamSearchParams
from gptjax.decode.contrastive import ContrastiveSearchParams
from gptjax.decode.drafting import SpeculativeConfig
from gptjax.decode.generate import GenerationConfig, Request
from gptjax.decode.settings import SamplingParams
from gptjax.runs import run

BYTES = tokenizers.bytes_encoding()
END, V, CONTEXT = 256, 257, 64
KINDS = {
    "learned": {},
    "modern": {
        "model_positions": "rotary",
        "model_norm": "rmsnorm",
        "model_kv_heads": 1,
        "model_qk_norm": "head",
        "model_scan_layers": True,
        "model_encoder_layers": 1,
    },
    "relative": {
        "model_positions": "relative",
        "model_head_bias": True,
        "model_logit_scale": 0.5,
        "model_norm_position": "post",
        "model_start": 3,
        "model_forced_first": 5,
    },
    "bahdanau": {"model_encoder": "gru", "model_decoder": "lstm"},
    "luong": {"model_encoder": "transformer", "model_decoder": "rnn", "model_attention": "multiplicative"},
}


@cache
def _run(changes):
    wild = {"model_arch": "seq2seq", "model_vocabulary": V, "model_context": CONTEXT, "model_init_std": 0.5}
    config = tiny_config(**wild | {"model_tied_head": False} | dict(changes))
    model = models.build(config.model)
    params = jax.jit(partial(models.init, model))(jax.random.key(1))
    if config.model.head_bias:
        params["head_bias"] = jax.random.normal(jax.random.key(2), (V,))
    return run.Run(Path("run"), config, model, params, BYTES)


def made(**changes):
    """A run of a tiny encoder-decoder with large random weights, so that its texts do not repeat themselves."""
    return _run(tuple(sorted(changes.items())))


def source_of(text):
    return [*text.encode(), END]


def start_of(of):
    return list(prompts.start_ids(of.config.model, BYTES))


def uncached(of, source):
    """A function from lists of a target's ids, all of one length, to log-probabilities of what comes next."""

    def next_logprobs(texts):
        ids_BT = np.zeros((8, CONTEXT), np.int32)
        for row, ids in zip(ids_BT, texts, strict=False):
            row[: len(ids)] = ids
        source_BS = np.zeros((8, CONTEXT), np.int32)
        source_BS[:, : len(source)] = source
        segments_BS = np.tile(np.arange(CONTEXT) < len(source), (8, 1)).astype(np.int32)
        logits = of.logits(ids_BT, source_BS, source_segments_BS=segments_BS)[: len(texts), len(texts[0]) - 1]
        return np.asarray(jax.nn.log_softmax(logits), np.float64)

    return next_logprobs


def request(prompt, seed=0, **settings):
    return Request(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12} | settings), jax.random.key(seed))


def answers(of, requests, **generation):
    found = dict(of.generate_batch(requests, GenerationConfig(**generation)))
    return [found[number] for number in range(len(requests))]


SOURCES = ["a man rides a bike.", "", "x", "zwei Hunde " * 5, "ünïcode"]


def check_sample(of, source, sample, prefix, process=lambda logprobs, ids: logprobs):
    next_logprobs, ids = uncached(of, source), list(prefix)
    for token, logprob in zip(sample.ids, sample.logprobs, strict=True):
        logprobs_V = next_logprobs([ids])[0]
        assert process(logprobs_V, ids).argmax() == token
        assert logprob == pytest.approx(logprobs_V[token], abs=1e-4)
        ids.append(token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_greedy_targets_equal_the_uncached_forward(kind):
    """Sources of one token and of many, in two rows, one after the other."""
    of = made(**KINDS[kind])
    found = answers(of, [request(text) for text in SOURCES], batch_size=2)
    for text, sample in zip(SOURCES, found, strict=True):
        assert sample.finish in ("length", "end")
        check_sample(of, source_of(text), sample, start_of(of))
    assert len({tuple(sample.ids) for sample in found}) > 3, "the source matters"


@pytest.mark.slow
def test_rows_of_different_sources_are_independent():
    of = made()
    requests = [
        request(text, seed=n, temperature=0.5 + n, top_k=9 + n, max_tokens=7 + n) for n, text in enumerate(SOURCES)
    ]
    together = answers(of, requests, batch_size=3, max_length=60)
    assert together == [answers(of, [one], batch_size=3, max_length=60)[0] for one in requests]


@pytest.mark.slow
def test_penalties_count_the_target_alone():
    """The same as in transformers, which penalizes the decoder's ids."""
    of = made()
    plain = answers(of, [request("xx")])[0]
    source = bytes(token for token in plain.ids[:3] if token < 128).decode()

    def penalised(logprobs_V, ids):
        penalised_V = logprobs_V.copy()
        penalised_V[list(set(ids[1:]))] -= 7
        return penalised_V

    sample = answers(of, [request(source, presence_penalty=7.0)])[0]
    check_sample(of, source_of(source), sample, start_of(of), penalised)
    assert len(set(sample.ids)) > len(set(answers(of, [request(source)])[0].ids))
    assert answers(of, [request(source, no_repeat_ngram=1)])[0].ids.count(END) == 0, "the start is of the target"


@pytest.mark.slow
def test_samples_of_one_source_encode_it_once(monkeypatch):
    of, calls = made(), []
    encode = prefill.with_encoder_output
    monkeypatch.setattr(prefill, "with_encoder_output", lambda *arguments: calls.append(1) or encode(*arguments))
    requests = [request("one source", seed=n, temperature=1.0) for n in range(4)]
    found = answers(of, [*requests, request("another")], batch_size=2)
    assert len(calls) == 2 and len({tuple(sample.ids) for sample in found}) == 5
    assert (
        answers(of, requests[2:3], batch_size=2, max_length=30)[0].ids
        == answers(of, requests, batch_size=2, max_length=30)[2].ids
    )


@pytest.mark.slow
def test_guidance_without_a_negative_prompt_uses_an_empty_source():
    of, scale = made(), 1.7
    for negative in (None, "bad"):
        sample = answers(of, [request("a man", max_tokens=6)], guidance=scale, negative=negative)[0]
        conditional, other = uncached(of, source_of("a man")), uncached(of, source_of(negative or ""))
        ids = start_of(of)
        for token in sample.ids:
            guided_V = scale * conditional([ids])[0] + (1 - scale) * other([ids])[0]
            assert guided_V.argmax() == token
            ids.append(token)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.slow
def test_speculation_gives_the_same_targets(draft):
    of = made()
    generation = {"draft": made(model_layers=1).generator} if draft else {}
    found = answers(
        of, [request(t) for t in SOURCES[:3]], speculation=SpeculativeConfig(3, ngram=0 if draft else 2), **generation
    )
    assert [sample.ids for sample in found] == [sample.ids for sample in answers(of, [request(t) for t in SOURCES[:3]])]


@pytest.mark.slow
def test_nothing_is_compiled_for_other_sources():
    of = made()
    compiled = lambda: [
        f._cache_size() for f in (prefill.with_encoder_output, engine.insert, step.decode_steps, beam.run_search)
    ]
    answers(of, [request("a" * 20), request("bb")], batch_size=2, max_length=40)
    answers(of, [request("a" * 20), request("bb")], batch_size=2, beams=BeamSearchParams(2))
    before = compiled()
    answers(of, [request("c" * 31), request("d" * 17), request("e")], batch_size=2, max_length=40)
    answers(
        of,
        [request("c" * 31), request("dd"), request("eee" * 6), request("f" * 19)],
        batch_size=2,
        beams=BeamSearchParams(2),
    )
    assert compiled() == before


@pytest.mark.slow
def test_encoder_output_has_the_cache_dtype():
    of = made()
    narrow = decoding.with_cache_dtype(of.generator, GenerationConfig(cache_dtype="bfloat16"))[0].decoder
    kept = prefill.encode_source(narrow, [[1, 2, 3]], narrow.empty(1, 8, 1)).encoder_output
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"bfloat16", "int32"}
    room = narrow.empty(1, 8, 1, 16).encoder_output
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(lambda x: (x.shape, x.dtype), room)
    wide, rough = (answers(of, [request("a man", max_tokens=1)], cache_dtype=d)[0] for d in ("", "bfloat16"))
    assert 0 < abs(wide.logprobs[0] - rough.logprobs[0]) < 0.1


@pytest.mark.parametrize(
    "kind, settings, max_tokens",
    [
        ("learned", BeamSearchParams(4, best=4), 40),
        ("modern", BeamSearchParams(4, 2, 0.5, length_penalty=0.4, early_stopping=True, best=3), 9),
        ("bahdanau", BeamSearchParams(3, length_penalty=2.0, early_stopping="never", best=3), 40),
        ("luong", BeamSearchParams(3, best=3), 9),
    ],
)
@pytest.mark.slow
def test_beams_equal_a_plain_reference(kind, settings, max_tokens):
    """Sources of different lengths in one batch; more tokens than a search has room for at first."""
    of = made(**KINDS[kind])
    sources, ends = [source_of(text) for text in SOURCES[:3]], [END, 7, 28] if max_tokens == 9 else [END]
    found = beam.search(of.generator.decoder, [[END]] * 3, settings, max_tokens, ends, sources=sources)
    for source, hypotheses in zip(sources, found, strict=True):
        same(hypotheses, reference(uncached(of, source), [END], settings, max_tokens, ends))
    if max_tokens > beam.INITIAL_CAPACITY:
        assert max(len(one.ids) for one in found[0]) > beam.INITIAL_CAPACITY
    alone = beam.search(of.generator.decoder, [[END]], settings, max_tokens, ends, sources=sources[2:])
    same(found[2], [(one.ids, one.score) for one in alone[0]], 1e-5)


@pytest.mark.slow
def test_a_forced_first_id_counts_in_scores():
    """The same as in transformers, which generates it with probability 1."""
    of = made(**KINDS["relative"])
    (found,) = beam.search(
        of.generator.decoder, [[3, 5]], BeamSearchParams(3, best=3), 6, [END], sources=[source_of("a man")]
    )
    for one in found:
        assert one.score == pytest.approx(sum(one.logprobs) / (len(one.ids) + 1), rel=1e-5)
    (plain,) = beam.search(made().generator.decoder, [[5]], BeamSearchParams(3), 6, [END], sources=[source_of("a man")])
    assert plain[0].score == pytest.approx(sum(plain[0].logprobs) / len(plain[0].ids), rel=1e-5)


@pytest.mark.slow
def test_searches_give_each_its_own_though_lengths_are_sorted():
    of = made()
    found = list(
        of.generate_batch(
            [request(text, max_tokens=6) for text in SOURCES],
            GenerationConfig(beams=BeamSearchParams(2, best=2), batch_size=2),
        )
    )
    assert sorted(number for number, _ in found) == sorted([*range(5)] * 2)
    for number, sample in found:
        next_logprobs = uncached(of, source_of(SOURCES[number]))
        logprobs = [next_logprobs([[END, *sample.ids[:n]]])[0, token] for n, token in enumerate(sample.ids)]
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["learned", "bahdanau"])
@pytest.mark.slow
def test_contrastive_search_without_a_penalty_is_greedy(kind):
    of = made(**KINDS[kind])
    found = answers(of, [request(t) for t in SOURCES], contrastive=ContrastiveSearchParams(0.0, 3), batch_size=2)
    assert [sample.ids for sample in found] == [
        sample.ids for sample in answers(of, [request(t) for t in SOURCES], batch_size=2)
    ]


@pytest.mark.slow
def test_contrastive_search_leaves_out_what_a_bias_is_multiplied_with():
    """That column of ones, beside hidden states, would make all of them alike."""
    plain, biased = made(), made(model_head_bias=True)
    zero = biased.params | {"head_bias": jnp.zeros(V)}
    with_zero = decoding.generator(biased.model, zero | {k: plain.params[k] for k in plain.params}, BYTES, CONTEXT)
    generation = GenerationConfig(contrastive=ContrastiveSearchParams(0.9, 4))
    found = [
        next(decoding.generate(of, [request("a man", max_tokens=20)], generation))[1]
        for of in (plain.generator, with_zero)
    ]
    assert found[0].ids == found[1].ids


@pytest.fixture
def translate(call, monkeypatch):
    """`translate(of, "--flag", ...)` runs the command with a run that is in memory only."""

    def command(of, *flags):
        monkeypatch.setattr(run, "load", lambda *_: of)
        return call(generate, "--workdir=run", "--max_tokens=5", *flags)

    return command


@pytest.mark.slow
def test_a_line_each_is_printed_without_the_sources(translate, tmp_path):
    of, file = made(), tmp_path / "sources.txt"
    file.write_text("a man\nx\nzwei Hunde\n")
    texts = [of.generate(text, temperature=0, max_tokens=5).text for text in file.read_text().split("\n")[:3]]
    assert translate(of, f"--prompts={file}", "--temperature=0").out == "\n".join(texts) + "\n"
    lines = translate(of, f"--prompts={file}", "--beams=3", "--best=2", "--json").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a man"] * 2 + ["x"] * 2 + ["zwei Hunde"] * 2
    assert json.loads(lines[0])["score"] >= json.loads(lines[1])["score"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=x", "--sliding_context"], "sliding_context is for decoders"),
        (["--chat"], "--chat needs a decoder; this run is an encoder-decoder"),
        (["--prompt=x", "--json", "--prompt_logprobs"], "--prompt_logprobs is for decoders"),
        (["--prompt=" + "x" * 64], "the source has 65 tokens, and the model's context is 64; shorten it"),
    ],
)
def test_unsupported_flags_are_refused_in_one_line(translate, flags, message):
    assert message in translate(made(), *flags).refusal()


@pytest.mark.slow
def test_other_kinds_of_models_are_refused():
    decoder = made(model_arch="gpt")
    with pytest.raises(ConfigError, match="can be combined only with encoder-decoders"):
        list(made().generate_batch([request("x")], GenerationConfig(ensemble=(decoder.generator,))))
    with pytest.raises(ConfigError, match="can be combined only with encoder-decoders"):
        list(
            decoder.generate_batch(
                [request("x")], GenerationConfig(speculation=SpeculativeConfig(), draft=made().generator)
            )
        )
    with pytest.raises(ConfigError, match="a recurrent model cannot take back"):
        list(
            made(**KINDS["luong"]).generate_batch(
                [request("x")], GenerationConfig(speculation=SpeculativeConfig(ngram=2))
            )
        )
    with pytest.raises(ConfigError, match="this model is an encoder and writes no text"):
        made(model_arch="encoder").generate("x")
