"""Contrastive search: against the paper's equation computed without a cache, its two greedy ends, and among others."""

import logging

import jax
import numpy as np
import pytest
from test_beam import ENDS, PROMPT, PROMPTS, imported, tiny

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.decode import contrastive
from gptjax.decode.contrastive import ContrastiveSearchParams


@pytest.fixture(scope="module")
def llama():
    return imported("llama")


@pytest.fixture(scope="module")
def learned():
    return tiny()


def uncached(of, context=42):
    """A function from ids to NumPy hidden states and log-probabilities of what comes next, at each, with no cache."""

    @jax.jit
    def both(ids_BT):
        message = models.forward(of.model, of.params, {"ids_BT": ids_BT})
        return message.x_BTD, jax.nn.log_softmax(models.next_logits(of.model, message.x_BTD, message.unembedding_VD))

    def forward(texts):
        ids_BT = np.zeros((6, context), np.int32)
        for row, text in zip(ids_BT, texts, strict=False):
            row[: len(text)] = text
        return [np.asarray(x[: len(texts), : len(texts[0])], np.float64) for x in both(ids_BT)]

    return forward


def reference(forward, prompt, settings, max_tokens, ends):
    """arXiv 2202.06417 equation 5, as it is written."""
    ids, message = list(prompt), []
    while len(message) < max_tokens and not (message and ids[-1] in ends):
        logprob_V = forward([ids])[1][0, -1]
        candidates = np.argsort(-logprob_V, kind="stable")[: settings.k]
        h_kTD = forward([[*ids, token] for token in candidates])[0]
        h_kTD /= np.linalg.norm(h_kTD, axis=-1, keepdims=True)
        penalty_k = (h_kTD[:, :-1] @ h_kTD[:, -1:].swapaxes(1, 2)).max((1, 2))
        score_k = (1 - settings.alpha) * np.exp(logprob_V[candidates]) - settings.alpha * penalty_k
        ids.append(int(candidates[score_k.argmax()]))
        message.append(logprob_V[ids[-1]])
    return ids[len(prompt) :], message


def greedy(forward, prompt, max_tokens):
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(forward([ids])[1][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", ContrastiveSearchParams()),
        ("llama", ContrastiveSearchParams(0.9, 6)),
        ("mistral", ContrastiveSearchParams(0.3, 3)),
    ],
)
@pytest.mark.slow
def test_equals_the_papers_equation(family, settings, llama):
    """Prompts of 8, 1, 3 and 30 tokens in batches of 3, some of whose texts end; Mistral looks back 5 tokens."""
    prompts = PROMPTS[:4]
    of = llama if family == "llama" else imported(family)
    forward, max_tokens, lengths = uncached(of), 12, set()
    found = contrastive.search(of, prompts, settings, max_tokens, ENDS, batch_size=3)
    for prompt, completion in zip(prompts, found, strict=True):
        ids, logprobs = reference(forward, prompt, settings, max_tokens, ENDS)
        assert completion.ids == ids
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        lengths.add(len(ids))
    assert len(lengths) > 1 and found[0].ids != greedy(forward, PROMPT, len(found[0].ids))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ContrastiveSearchParams(alpha=0.0), ContrastiveSearchParams(k=1)])
def test_without_a_penalty_or_a_choice_it_is_greedy(settings, llama):
    found = contrastive.search(llama, [PROMPT], settings, 15)
    assert found[0].ids == greedy(uncached(llama), PROMPT, 15)


@pytest.mark.slow
def test_every_token_of_a_small_vocabulary_is_a_candidate(learned):
    settings = ContrastiveSearchParams(0.5, 50)
    found = contrastive.search(learned, [[1, 2]], settings, 6)
    forward = uncached(learned, 16)
    assert found[0].ids == reference(forward, [1, 2], settings._replace(k=5), 6, [])[0]


def test_other_lengths_and_settings_compile_nothing(llama, caplog):
    contrastive.search(llama, [PROMPT, [5] * 20], ContrastiveSearchParams(k=3), 9, ENDS)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        contrastive.search(
            llama, [[3] * 14, [1, 2, 3], [9] * 31, [4]], ContrastiveSearchParams(0.2, 3), 11, [1, 2], batch_size=2
        )
        assert [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()] == []


def test_ends_with_the_models_context(learned):
    found = contrastive.search(learned, [[1] * 15, [2] * 13], ContrastiveSearchParams(), 9)
    assert [len(one.ids) for one in found] == [1, 3]
    with pytest.raises(DataError, match="prompt 1 has 16 tokens; the model's context leaves room for 15"):
        contrastive.search(learned, [[1] * 16], ContrastiveSearchParams(), 9)


@pytest.mark.parametrize(
    "settings, message",
    [
        (ContrastiveSearchParams(1.5), "alpha is 1.5"),
        (ContrastiveSearchParams(float("nan")), "alpha"),
        (ContrastiveSearchParams(k=0), "k"),
    ],
)
def test_invalid_settings_are_refused(settings, message, llama):
    with pytest.raises(ConfigError, match=f"^{message}[^\n]*$"):
        contrastive.search(llama, [[1]], settings, 3)
