"""Beam search: against transformers, live and golden, a plain reference without a cache, and every text there is."""

import itertools
import logging
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import hub
from gptjax.decode import beam, prefill
from gptjax.decode.beam import BeamSearchParams
from gptjax.interop import convert_run, families

sys.path.append(str(ROOT / "tests" / "golden"))
import make_beam
import make_hf

PROMPT, ENDS, MAX_TOKENS = make_beam.PROMPT, make_beam.ENDS, make_beam.MAX_TOKENS
PROMPTS = [PROMPT, [5], [7, 30, 2], list(range(30)), [1, 2] * 10]
CASES = [(penalty, stopping) for penalty in make_beam.PENALTIES for stopping in make_beam.STOPPING]


def imported(family):
    """A Reader of a golden folder's model, its embedding drawn anew so that texts differ; llama as in make_beam."""
    folder = make_hf.FOLDER / family
    family, config = families.model_of(hub.read_json(folder / "config.json"))
    params = convert_run.read_params(folder, family, config)
    embedding = params["tokens"]["embedding"]
    params["tokens"]["embedding"] = 0.3 * np.random.default_rng(1).normal(size=embedding.shape).astype("f")
    if folder.name == "llama":
        params["tokens"]["embedding"], head = make_beam.tables()
        params["head"]["kernel"] = head.T
    return prefill.decoder(models.build(config), jax.tree.map(jnp.asarray, params))


def tiny():
    """A Reader of a model that can read 16 tokens, with a vocabulary of 5."""
    model = models.build(tiny_config(model_vocabulary=5, model_init_std=1.0).model)
    return prefill.decoder(model, model.init(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))["params"])


@pytest.fixture(scope="module")
def llama():
    return imported("llama")


@pytest.fixture(scope="module")
def learned():
    return tiny()


def uncached(of, context):
    """A function from lists of ids of one length to NumPy log-probabilities of what comes next, with no cache."""
    logits = jax.jit(lambda ids_BT: jax.nn.log_softmax(models.logits(of.model, of.params, ids_BT)))

    def next_logprobs(texts):
        ids_BT = np.zeros((16, context), np.int32)
        for row, text in zip(ids_BT, texts, strict=False):
            row[: len(text)] = text
        return np.asarray(logits(ids_BT)[: len(texts), len(texts[0]) - 1], np.float64)

    return next_logprobs


def reference(next_logprobs, prompt, settings, max_tokens, ends):
    """Beam search as the paper on groups has it (arXiv 1610.02424), and as transformers ends it, in plain lists."""
    W = settings.beams // settings.groups
    groups = [{"beams": [(0.0, [])], "done": [], "open": True} for _ in range(settings.groups)]
    for n in range(1, max_tokens + 1):
        seen = Counter()
        for group in groups:
            if not group["open"]:
                continue
            logprobs = next_logprobs([prompt + ids for _, ids in group["beams"]])
            candidates = sorted(
                (
                    (score + logprob - settings.diversity_penalty * seen[token], [*ids, token])
                    for (score, ids), row in zip(group["beams"], logprobs, strict=True)
                    for token, logprob in enumerate(row)
                ),
                reverse=True,
            )
            ended = [c for c in candidates[:W] if c[1][-1] in ends or n == max_tokens]
            group["done"] += [(score / n**settings.length_penalty, ids) for score, ids in ended]
            group["done"] = sorted(group["done"], reverse=True)[:W]
            group["beams"] = [c for c in candidates if c[1][-1] not in ends][:W]
            seen.update(ids[-1] for _, ids in group["beams"])
            hoped = max_tokens if settings.early_stopping == "never" and settings.length_penalty > 0 else n
            full = len(group["done"]) == W
            hope = group["beams"][0][0] / hoped**settings.length_penalty
            group["open"] = not full or (settings.early_stopping is not True and hope > group["done"][-1][0])
    done = sorted((found for group in groups for found in group["done"]), reverse=True)
    return [(ids, score) for score, ids in done[: settings.best]]


def same(found, expected, tolerance=1e-4):
    """Asserts that hypotheses are those expected, [(ids, score)]."""
    assert [one.ids for one in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([one.score for one in found], [score for _, score in expected], rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("width", make_beam.WIDTHS)
def test_equals_transformers(llama, width):
    """Prompts of one length, for transformers pads what is shorter; the golden file has more cases."""
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    hf_model, lengths, ends = make_beam.load(), set(), [2, 26]
    prompts = [PROMPT, PROMPT[::-1], [20, 29, 30, 31, 32, 33, 34, 35]]
    for penalty, stopping in CASES[width % 2 :: 4] if width > 1 else CASES[:1]:
        expected = make_beam.searched(hf_model, prompts, width, penalty, stopping, width, ends)
        settings = BeamSearchParams(width, length_penalty=penalty, early_stopping=stopping, best=width)
        for hypotheses, each in zip(beam.search(llama, prompts, settings, MAX_TOKENS, ends), expected, strict=True):
            if width == 1:
                assert hypotheses[0].ids == each[0][0]
            else:
                same(hypotheses, each)
            lengths |= {len(one.ids) for one in hypotheses}
    assert min(lengths) < MAX_TOKENS, "some end before the others"


@pytest.mark.parametrize("width", make_beam.WIDTHS[1:])
def test_equals_its_golden_file(llama, width):
    golden = np.load(make_beam.GOLDEN)
    for penalty, stopping in CASES:
        name = f"{width} {penalty} {stopping}"
        expected = [[int(i) for i in row if i >= 0] for row in golden[f"{name} ids"]]
        settings = BeamSearchParams(width, length_penalty=penalty, early_stopping=stopping, best=width)
        found = beam.search(llama, [PROMPT], settings, MAX_TOKENS, ENDS)[0]
        same(found, list(zip(expected, golden[f"{name} scores"], strict=True)))
        assert beam.search(llama, [PROMPT], settings._replace(best=1), MAX_TOKENS, ENDS)[0] == found[:1]
    assert len({golden[f"{width} {p} {s} ids"].tobytes() for p, s in CASES}) > 3, "the settings matter"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", BeamSearchParams(4, 2, 0.5, best=4)),
        ("llama", BeamSearchParams(6, 3, 2.0, length_penalty=0.5, early_stopping="never", best=6)),
        ("mistral", BeamSearchParams(3, 3, 1.0, early_stopping=True, best=3)),  # looks back 5 tokens
    ],
)
def test_groups_equal_a_plain_reference(family, settings, llama):
    of = llama if family == "llama" else imported(family)
    next_logprobs = uncached(of, 24)
    prompts = [PROMPT, [5], [7, 2, 30]]
    found = beam.search(of, prompts, settings, 9, ENDS)
    for prompt, hypotheses in zip(prompts, found, strict=True):
        same(hypotheses, reference(next_logprobs, prompt, settings, 9, ENDS))


def test_groups_differ(llama):
    """At the first step each group of one beam takes a token that the others have not."""
    first = [one.ids[0] for one in beam.search(llama, [PROMPT], BeamSearchParams(4, 4, 50.0, best=4), 6)[0]]
    assert len(set(first)) == 4
    alike = [one.ids[0] for one in beam.search(llama, [PROMPT], BeamSearchParams(4, 4, 1e-6, best=4), 6)[0]]
    assert len(set(alike)) < 4


@pytest.mark.slow
def test_wide_beams_find_the_best_of_all_texts(learned):
    """With a vocabulary of 5 and one end, 4 tokens make 341 texts, of 64 prefixes and fewer."""
    prompt, end, T = [1, 2, 3], 4, 4
    texts = [ids for n in range(1, T + 1) for ids in itertools.product(range(5), repeat=n) if end not in ids[:-1]]
    texts = [ids for ids in texts if len(ids) == T or ids[-1] == end]
    assert len(texts) == 341
    batch = np.array([[*prompt, *ids, *[0] * (T - len(ids))] for ids in texts])
    logprobs = np.asarray(jax.nn.log_softmax(models.logits(learned.model, learned.params, batch)))
    sums = [
        sum(row[len(prompt) - 1 + t, i] for t, i in enumerate(ids)) for row, ids in zip(logprobs, texts, strict=True)
    ]
    for penalty in (0.0, 1.0, 2.0):
        scores = [one / len(ids) ** penalty for one, ids in zip(sums, texts, strict=True)]
        best = [(list(texts[i]), scores[i]) for i in np.argsort(scores)[::-1][:10]]
        settings = BeamSearchParams(64, length_penalty=penalty, early_stopping="never", best=10)
        same(beam.search(learned, [prompt], settings, T, [end])[0], best)


def test_one_beam_is_greedy(llama):
    next_logprobs, ids = uncached(llama, 24), []
    while len(ids) < MAX_TOKENS and not (ids and ids[-1] in ENDS):
        ids.append(int(next_logprobs([PROMPT + ids])[0].argmax()))
    for penalty, stopping in CASES:
        settings = BeamSearchParams(1, length_penalty=penalty, early_stopping=stopping)
        assert beam.search(llama, [PROMPT], settings, MAX_TOKENS, ENDS)[0][0].ids == ids


def test_log_probabilities_are_those_of_the_model(llama):
    """With groups the score has penalties in it, and the log-probabilities have not."""
    next_logprobs = uncached(llama, 24)
    for settings in (BeamSearchParams(4, best=4), BeamSearchParams(4, 4, 0.2, best=4)):
        found = beam.search(llama, [PROMPT], settings, MAX_TOKENS, ENDS)[0]
        for one in found:
            for t, (token, logprob) in enumerate(zip(one.ids, one.logprobs, strict=True)):
                assert logprob == pytest.approx(next_logprobs([PROMPT + one.ids[:t]])[0, token], abs=1e-4)
        ratios = [sum(one.logprobs) / len(one.ids) / one.score for one in found]
        assert all(ratio == pytest.approx(1, abs=1e-5) for ratio in ratios) == (settings.groups == 1)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 2])
def test_prompts_of_different_lengths_are_independent(llama, rows):
    settings = BeamSearchParams(4, 2, 0.5, best=3)
    together = beam.search(llama, PROMPTS, settings, MAX_TOKENS, ENDS, batch_size=rows)
    assert len(together) == len(PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = beam.search(llama, [prompt], settings, MAX_TOKENS, ENDS)[0]
        same(found, [(one.ids, one.score) for one in alone], 1e-5)


@pytest.mark.slow
def test_other_lengths_and_settings_compile_nothing(llama, caplog):
    beam.search(llama, [PROMPT, [5] * 20], BeamSearchParams(2, best=2), 9, ENDS)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        settings = BeamSearchParams(2, length_penalty=0.3, early_stopping="never")
        beam.search(llama, [[3] * 14, [1, 2, 3], [9] * 31, [4]], settings, 11, [1, 2], batch_size=2)
        assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []
        beam.search(llama, [PROMPT], BeamSearchParams(3), 9, ENDS)
        assert any("ompil" in r.getMessage() for r in caplog.records), "another width would be seen"


@pytest.mark.slow
def test_ends_with_the_models_context(learned):
    found = beam.search(learned, [[1] * 16, [2] * 13], BeamSearchParams(3, best=3), 9)
    assert [{len(one.ids) for one in each} for each in found] == [{1}, {4}]
    with pytest.raises(DataError, match="prompt 2 has 17 tokens; the model's context leaves room for 16"):
        beam.search(learned, [[1], [1] * 17], BeamSearchParams(), 9)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(beams=0), "beams is 0; it must be at least 1"),
        (dict(best=0), "best is 0"),
        (dict(best=5), "best=5 is more than beams=4"),
        (dict(groups=3, diversity_penalty=1.0), "groups=3 does not divide beams=4"),
        (dict(groups=2), "must be given together"),
        (dict(diversity_penalty=1.0), "must be given together"),
        (dict(groups=2, diversity_penalty=-1.0), "diversity_penalty is -1.0"),
        (dict(length_penalty=float("nan")), "length_penalty is nan"),
        (dict(early_stopping="ever"), 'must be True, False or "never"'),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ConfigError) as refused:
        BeamSearchParams(**changes).check()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_no_tokens_are_refused(llama):
    with pytest.raises(DataError, match="prompt 2 has no tokens"):
        beam.search(llama, [[1], []], BeamSearchParams(), 3)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        beam.search(llama, [[1]], BeamSearchParams(), 0)
    assert beam.search(llama, [], BeamSearchParams(), 3) == []
