"""Capturing and changing sites, against a two-layer model in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from written_out import IDS, made, written_out

from gptjax import models
from gptjax.config.errors import DataError
from gptjax.interpret import sites
from gptjax.models.stacking import stack


@pytest.mark.parametrize("scanned", [False, True])
def test_every_site_is_what_the_formulas_give(scanned):
    model, params = made(model_scan_layers=scanned)
    plain = made()[1]
    captured = sites.capture(model, stack(plain) if scanned else params, IDS, ".*")
    for name, expected in written_out(plain, IDS).items():
        if "weights" not in name:
            np.testing.assert_allclose(captured[name], expected, atol=2e-3, rtol=2e-3, err_msg=name)


def test_a_pattern_keeps_what_it_names_and_the_stream_is_in_order():
    model, params = made()
    captured = sites.capture(model, params, IDS, r"block_\d+/mlp")
    assert list(captured) == ["block_0/mlp", "block_1/mlp"]
    expected = written_out(params, IDS)
    stream = [expected[name] for name in ("block_0.in", "block_0", "block_1")]
    np.testing.assert_allclose(sites.stream(model, params, IDS), stream, atol=2e-3, rtol=2e-3)
    names = sites.names(model, params, IDS)
    assert names["block_1/mlp/down.in"] == (2, 9, 64) and list(names)[-1] == "logits"


def test_what_is_changed_is_what_a_changed_model_makes():
    model, params = made()
    edited = jax.tree.map(lambda leaf: leaf, params)
    edited["block_0"]["mlp"]["down"]["kernel"] *= 0
    expected = models.logits(model, edited, IDS)
    for change in (0.0, lambda x: x * 0):
        changed = sites.forward(model, params, IDS, changes={"block_0/mlp": change}).logits_BTV
        np.testing.assert_allclose(changed, expected, atol=1e-4)
    doubled = sites.forward(model, params, IDS, changes={"tokens": lambda x: 2 * x}, keep="tokens").activations[
        "tokens"
    ]
    np.testing.assert_allclose(doubled, 2 * params["tokens"]["embedding"][IDS], rtol=1e-6)


def test_what_is_attached_is_seen_from_outside():
    model, params = made()

    def attached(call, args, kwargs, context):
        given = call(*args, **kwargs)
        return given + 1 if context.module.path == ("block_0", "mlp") else given

    captured = sites.capture(model.clone(attached=attached), params, IDS, "block_0/mlp")
    np.testing.assert_allclose(
        captured["block_0/mlp"], written_out(params, IDS)["block_0/mlp"] + 1, atol=2e-3, rtol=2e-3
    )


def test_a_table_that_is_read_twice_has_two_sites():
    model, params = made(model_arch="seq2seq")
    source = jnp.asarray(IDS[:, :4])
    more = dict(source_BS=source, source_segments_BS=jnp.ones_like(source))
    names = sites.names(model, params, IDS, **more)
    assert names["tokens"] == (2, 4, 16) and names["tokens#2"] == (2, 9, 16)
    assert names["decoder/block_1/cross"] == (2, 9, 16)


def test_missing_site_names_similar_sites():
    model, params = made()
    with pytest.raises(DataError, match="no site 'block_0/mpl'.*block_0/mlp"):
        sites.forward(model, params, IDS, changes={"block_0/mpl": 0.0})
    with pytest.raises(DataError, match="no site"):
        sites.capture(model, params, IDS, "block_7")
