"""Scoring: against the uncached forward pass, in windows, in batches, and with few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.decode import prefill, scoring

CONTEXT, VOCABULARY = 160, 97
MEMBERS = {
    "learned": dict(),
    "rotary": dict(model_positions="rotary", model_kv_heads=1),
    "alibi": dict(model_positions="alibi", model_logit_softcap=3.0),
    "windows": dict(model_positions="rotary", model_windows="(5,0)", model_scan_layers=True),
    "experts": dict(model_mlp="experts", model_experts=3, model_value_residual=True),
}


def made(**changes):
    """Returns a model, its random parameters, and its decoder."""
    config = tiny_config(**{"model_context": CONTEXT} | changes).model.copy_and_resolve_references()
    config.unlock()
    config.vocabulary = VOCABULARY
    model = models.build(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), models.shapes(model))
    return model, params, prefill.decoder(model, params)


def drawn(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]


uncached_forward = jax.jit(
    lambda model, params, ids: jax.nn.log_softmax(models.logits(model, params, ids)), static_argnums=0
)


def uncached(model, params, ids):
    """Log-probabilities of all ids for the place after each, [T, V]; ids after the text change nothing."""
    ids_1S = np.zeros((1, model.config.context), np.int32)
    ids_1S[0, : len(ids)] = ids
    return np.asarray(uncached_forward(model, params, ids_1S))[0, : len(ids)]


@pytest.fixture(scope="module")
def learned():
    return made()


@pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.slow
def test_scores_equal_the_uncached_forward_pass(changes):
    """Alone and beside texts of other lengths, in several chunks, with the most likely ids; results in order."""
    model, params, of = made(**changes)
    texts = drawn(130, 3, 1, 70, 160, 2)
    together = scoring.score_texts(of, texts, alternatives=3, batch_size=4)
    alone = [scoring.score_text(of, texts[0], alternatives=3), scoring.score_text(of, texts[2], alternatives=3)]
    for ids, scores in [*zip(texts, together, strict=True), (texts[0], alone[0]), (texts[2], alone[1])]:
        assert scores.logprobs.shape == (len(ids) - 1,) and scores.top_ids.shape == (len(ids) - 1, 3)
        assert scores.logprobs.dtype == scores.top_logprobs.dtype == np.float32 and scores.top_ids.dtype == np.int32
        expected = uncached(model, params, ids)[:-1]
        np.testing.assert_allclose(scores.logprobs, expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-5)
        best = np.argsort(-expected, kind="stable")[:, :3]
        np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(expected, best, 1), atol=1e-5)
        chosen = np.take_along_axis(expected, scores.top_ids, 1)
        np.testing.assert_allclose(scores.top_logprobs, chosen, atol=1e-5)


def test_a_text_may_end_with_one_id_more_than_the_model_reads(learned):
    model, params, of = learned
    (ids,) = drawn(CONTEXT + 1)
    expected = uncached(model, params, ids[:-1])[np.arange(CONTEXT), ids[1:]]
    np.testing.assert_allclose(scoring.score_text(of, ids).logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("context", [12, 40])
def test_a_context_that_no_chunk_divides_is_read_to_its_end(context):
    """Learned positions have no row for the padding of a longer chunk."""
    model, params, of = made(model_context=context)
    (ids,) = drawn(context)
    expected = uncached(model, params, ids)[np.arange(context - 1), ids[1:]]
    np.testing.assert_allclose(scoring.score_text(of, ids).logprobs, expected, atol=1e-5)
    cache = prefill.prefill(of, ids, of.empty(1, context, prefill.max_chunk()))
    assert cache.length_B.tolist() == [context]


def test_continuations_have_a_sum_and_are_greedy_or_not(learned):
    model, params, of = learned
    (prompt,) = drawn(9)
    greedy = list(prompt)
    for _ in range(4):
        greedy.append(int(uncached(model, params, greedy)[-1].argmax()))
    likely, other = greedy[9:], [*greedy[9:12], (greedy[12] + 1) % VOCABULARY]
    scores = scoring.score_continuations(of, [(prompt, other), (prompt, likely), (prompt, [])])
    assert [one.is_greedy for one in scores] == [False, True, True]
    for ids, one in zip((other, likely), scores, strict=False):
        expected = uncached(model, params, prompt + ids)[np.arange(8, 12), ids].sum()
        assert one.logprob == pytest.approx(expected, abs=1e-4)
    assert scores[2].logprob == 0
    again = scoring.score_continuation(of, prompt, likely)
    assert again.is_greedy and again.logprob == pytest.approx(scores[1].logprob, abs=1e-5)


@pytest.mark.parametrize("length", [2, 40, 41, 42, 57, 100, 101])
@pytest.mark.parametrize("stride", [1, 13, 40])
def test_windows_score_each_id_once_after_enough_others(length, stride):
    context, ids = 40, list(range(length))
    scored = []
    for number, (part, n) in enumerate(scoring.windows(ids, context, stride)):
        assert 0 < n and len(part) <= context + 1
        scored += part[len(part) - n :]
        assert number == 0 or len(part) - n >= context - stride + 1
    assert scored == ids[1:]


def test_a_long_text_is_read_in_overlapping_windows():
    model, params, of = made(model_context=40)
    ids, short = drawn(107, 12)
    long, alone = scoring.score_texts(of, [ids, short], alternatives=2, stride=16, batch_size=3)
    np.testing.assert_allclose(alone.logprobs, uncached(model, params, short)[np.arange(11), short[1:]], atol=1e-5)
    assert long.logprobs.shape == (106,) and long.top_ids.shape == (106, 2)
    for place in (1, 40, 41, 56, 57, 72, 73, 106):
        begin = -(-max(0, place - 40) // 16) * 16  # of the window that scores it
        expected = uncached(model, params, ids[begin:place])[-1, ids[place]]
        assert long.logprobs[place - 1] == pytest.approx(float(expected), abs=1e-5)


def test_another_length_within_a_chunk_compiles_nothing(learned):
    _, _, of = learned
    scoring.score_texts(of, drawn(60, 59, 50), batch_size=4)
    scoring.score_texts(of, drawn(9, 5, 4), batch_size=4)
    programs = scoring.score._cache_size()
    scoring.score_texts(of, drawn(64, 50, 40, 33, seed=2), batch_size=4)
    scoring.score_texts(of, drawn(17, 16, 2, seed=3), batch_size=4)
    assert scoring.score._cache_size() == programs
    scoring.score_texts(of, drawn(130, 16, 2), batch_size=4)
    assert scoring.score._cache_size() > programs


def test_logits_exist_for_one_chunk_at_a_time(learned, monkeypatch):
    """Many rows or a large vocabulary make chunks shorter."""
    model, params, of = learned
    sizes = []
    spied = scoring.score

    def score(*arguments):
        sizes.append(arguments[3].size * VOCABULARY)
        return spied(*arguments)

    monkeypatch.setattr(scoring, "score", score)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * 16 * VOCABULARY)
    texts = drawn(100, 90)
    for ids, scores in zip(texts, scoring.score_texts(of, texts, batch_size=2), strict=True):
        expected = uncached(model, params, ids)[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-5)
    assert len(sizes) == 7 and max(sizes) == 2 * 16 * VOCABULARY


@pytest.mark.parametrize(
    "wanted, error, words",
    [
        (dict(texts=[[1], []]), DataError, "a text to score has no tokens"),
        (dict(texts=[[1] * (CONTEXT + 2)]), DataError, "has 162 tokens, more than the model's context of 160"),
        (dict(texts=[[1, VOCABULARY]]), DataError, "ids must lie in 0 to 96"),
        (dict(texts=[[1, -1]]), DataError, "ids must lie in 0 to 96"),
        (dict(texts=[[1]], stride=CONTEXT + 1), ConfigError, "stride is 161; it must be 0 to 160"),
        (dict(texts=[[1]], alternatives=-1), ConfigError, "alternatives is -1"),
        (dict(texts=[[1]], batch_size=0), ConfigError, "batch_size is 0"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused_in_one_line(learned, wanted, error, words):
    with pytest.raises(error, match=words) as caught:
        scoring.score_texts(learned[2], **wanted)
    assert "\n" not in str(caught.value)


def test_a_continuation_needs_a_prompt(learned):
    with pytest.raises(DataError, match="a prompt has no tokens"):
        scoring.score_continuation(learned[2], [], [1])
