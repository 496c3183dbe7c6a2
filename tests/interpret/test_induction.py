"""Induction scores of two constructed heads: an induction head, and uniform attention."""

import jax
import numpy as np
from written_out import made

from gptjax.interpret import induction


def test_a_head_that_reads_what_followed_scores_one():
    T, maps = 8, np.zeros((1, 2, 2, 8, 8))
    for t in range(4, T):
        maps[0, :, 0, t, t - 3] = 1
    maps[0, :, 1] = np.tri(T) / np.arange(1, T + 1)[:, None]
    np.testing.assert_allclose(induction.scores_from_maps(maps)[0], [1, np.mean(1 / np.arange(5, 9))])


def test_texts_are_said_twice_and_a_random_model_hardly_knows():
    ids_BT = induction.repeated_tokens(jax.random.key(0), 3, 5, 257)
    np.testing.assert_array_equal(ids_BT[:, :5], ids_BT[:, 5:])
    assert len(set(np.ravel(ids_BT[:, :5]).tolist())) > 10
    model, params = made()
    scores = induction.scores(model, params, jax.random.key(0))
    assert scores.shape == (2, 2) and (scores > 0).all() and (scores < 0.5).all()
