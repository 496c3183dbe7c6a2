"""Recurrent language models through the same engine and searches, against forward passes without a cache."""

import jax
import numpy as np
import pytest
from test_beam import reference, same
from test_engine import answers, check_sample, generator, request, uncached

from gptjax.decode import beam
from gptjax.decode.beam import BeamSearchParams
from gptjax.decode.contrastive import ContrastiveSearchParams

CELLS = [pytest.param("lstm"), pytest.param("gru", marks=pytest.mark.slow), pytest.param("rnn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_texts_equal_the_uncached_forward(cell):
    """Prompts of several pieces, one the beginning of another, in two rows; a state is of all that was read."""
    of = generator(model_arch="recurrent", model_cell=cell, model_context=256, model_init_std=1.0)
    prompts = [tuple(range(60)) * 2, tuple(range(60)) * 2 + (7, 8), (3,), (3, 1, 4), tuple(range(60)) * 2]
    found = answers(of, [request(p, temperature=0, max_tokens=15) for p in prompts], batch_size=2)
    for prompt, sample in zip(prompts, found, strict=True):
        check_sample(uncached(of, [*prompt, *sample.ids]), prompt, sample)


def test_texts_are_longer_than_a_sliding_context():
    of = generator(model_arch="recurrent", model_context=16, model_init_std=1.0)
    (sample,) = answers(of, [request((1, 2, 3), temperature=0, max_tokens=60)], sliding_context=True)
    assert len(sample.ids) == 60
    check_sample(uncached(of, [1, 2, 3, *sample.ids], context=64), (1, 2, 3), sample)


@pytest.mark.slow
def test_searches_equal_plain_references():
    of = generator(model_arch="recurrent", model_context=64, model_init_std=1.0)

    def next_logprobs(texts):
        return np.stack(
            [np.asarray(jax.nn.log_softmax(uncached(of, ids + [0] * (24 - len(ids)))))[len(ids) - 1] for ids in texts]
        )

    prompts, settings = [[1, 2, 3], [5]], BeamSearchParams(3, length_penalty=0.5, best=3)
    for prompt, hypotheses in zip(prompts, beam.search(of.decoder, prompts, settings, 8, [4, 9]), strict=True):
        same(hypotheses, reference(next_logprobs, prompt, settings, 8, [4, 9]))
    (greedy,) = answers(of, [request((1, 2), temperature=0, max_tokens=9)])
    (contrastive,) = answers(of, [request((1, 2), max_tokens=9)], contrastive=ContrastiveSearchParams(0.0, 3))
    assert contrastive.ids == greedy.ids
