"""A tuned lens starts as the logit lens and approaches the model; an autoencoder recovers known directions."""

import jax
import jax.numpy as jnp
import numpy as np
from written_out import IDS, made

from gptjax import models
from gptjax.interpret import lens, sparse, tuned_lens


def test_the_tuned_lens_begins_as_the_logit_lens_and_comes_nearer():
    model, params = made()
    first = tuned_lens.init_translators(model)
    np.testing.assert_allclose(
        tuned_lens.tuned_lens(model, params, first, IDS), lens.logit_lens(model, params, IDS), atol=1e-4
    )
    batches = np.random.default_rng(0).integers(0, 257, (150, 8, 12))
    maps, losses_nL = tuned_lens.train(model, params, batches, learning_rate=5e-3)
    losses = np.asarray(losses_nL)
    assert (losses[-10:].mean(0) < 0.6 * losses[:3].mean(0)).all(), losses[[0, -1]]
    result = tuned_lens.tuned_lens(model, params, maps, IDS)
    right = jax.nn.log_softmax(models.logits(model, params, IDS))
    unseen = (jnp.exp(right) * (right - jax.nn.log_softmax(result))).sum(-1).mean((1, 2))
    before = (jnp.exp(right) * (right - jax.nn.log_softmax(lens.logit_lens(model, params, IDS)))).sum(-1).mean((1, 2))
    assert (unseen[:2] < before[:2]).all() and abs(float(unseen[2])) < 1e-4


def test_known_directions_are_found():
    """Recovers all 20 directions in 16 dimensions from vectors that are sums of two of them."""
    rng = np.random.default_rng(0)
    true_FD = rng.normal(size=(20, 16))
    true_FD /= np.linalg.norm(true_FD, axis=1, keepdims=True)
    chosen, amounts = np.argsort(rng.random((4000, 20)), axis=1)[:, :2], np.zeros((4000, 20))
    np.put_along_axis(amounts, chosen, rng.uniform(0.5, 1.5, (4000, 2)), axis=1)
    x_ND = jnp.asarray(amounts @ true_FD, jnp.float32)
    coder, progress = sparse.train(jax.random.key(0), x_ND, 40, 1500, l1=0.1, learning_rate=3e-3)
    np.testing.assert_allclose(jnp.linalg.norm(coder.directions_FD, axis=1), 1, atol=1e-5)
    assert progress.unexplained[-50:].mean() < 0.05 and progress.active[-50:].mean() < 7 < progress.active[0]
    assert np.abs(true_FD @ np.asarray(coder.directions_FD).T).max(1).min() > 0.9
    rebuilt = sparse.decode(coder, sparse.encode(coder, x_ND))
    assert ((rebuilt - x_ND) ** 2).sum(-1).mean() < 0.05 * ((x_ND - x_ND.mean(0)) ** 2).sum(-1).mean()
