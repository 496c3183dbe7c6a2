"""Gradients against finite differences, and completeness of integrated gradients."""

import jax.numpy as jnp
import numpy as np
from written_out import IDS, made, normed, written_out

from gptjax.interpret import gradients, measures, sites


def test_integrated_gradients_are_complete():
    """They sum to the measure minus that of the baseline (arXiv 1703.01365 proposition 1)."""
    model, params = made()
    measure = measures.logit_difference(7, 9, position=5)
    other = sites.capture(model, params, IDS[::-1], "block_1.in")["block_1.in"]
    for site, baseline in (("tokens", 0.0), ("block_1.in", other)):
        result = gradients.integrated_gradients(model, params, IDS, measure, site, baseline, steps=256)
        whole = measure(sites.forward(model, params, IDS).logits_BTV)
        empty = measure(sites.forward(model, params, IDS, changes={site: jnp.asarray(baseline)}).logits_BTV)
        np.testing.assert_allclose(result.sum((1, 2)), whole - empty, atol=0.02 * np.abs(whole - empty).max())
        assert np.abs(result[:, :6]).min() > 0 and (np.asarray(result[:, 6:]) == 0).all(), (
            "it reads only what is before"
        )


def test_gradient_times_input_is_a_slope():
    """At the last block's output, against central differences of the head in NumPy."""
    model, params = made()
    result = gradients.gradient_times_input(model, params, IDS, measures.logit(4), "block_1")
    x, table_VD = written_out(params, IDS)["block_1"], np.asarray(params["tokens"]["embedding"], np.float64)
    for column in (0, 11):
        moved = np.zeros(16)
        moved[column] = 1e-4
        up, down = (normed(x[:, -1] + sign * moved, params["final_norm"]) @ table_VD[4] for sign in (1, -1))
        np.testing.assert_allclose(result[:, -1, column], (up - down) / 2e-4 * x[:, -1, column], rtol=5e-3, atol=1e-3)
    assert (np.asarray(result[:, :-1]) == 0).all()
