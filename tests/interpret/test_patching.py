"""Patches and ablations against edited models and against a forward pass in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from written_out import IDS, linear, made, normed, written_out

from gptjax import models
from gptjax.config.errors import DataError
from gptjax.interpret import ablation, measures, patching, sites

OTHER = IDS.copy()
OTHER[:, 3] += 100
CLOSE = dict(atol=2e-3, rtol=2e-3)
MEASURE = measures.logit_difference([5, 6], 9)


def measured(logits_BTV):
    return logits_BTV[:, -1][[0, 1], [5, 6]] - logits_BTV[:, -1, 9]


@pytest.mark.slow
def test_a_head_ablated_is_a_head_whose_rows_are_zero():
    model, params = made()
    lost_LHB = ablation.heads(model, params, IDS, MEASURE)
    edited = jax.tree.map(lambda leaf: leaf, params)
    out = edited["block_1"]["attention"]["out"]
    out["kernel"] = out["kernel"].at[:8].set(0)
    expected = measured(models.logits(model, edited, IDS))
    np.testing.assert_allclose(lost_LHB[1, 0], expected - measured(models.logits(model, params, IDS)), **CLOSE)
    changed = sites.forward(model, params, IDS, changes=ablation.ablate_heads(model, [(1, 0)])).logits_BTV
    np.testing.assert_allclose(measured(changed), expected, **CLOSE)
    out["kernel"] = jnp.zeros_like(out["kernel"])
    both = ablation.ablate_heads(model, [(1, 0), (1, 1)])
    changed = sites.forward(model, params, IDS, changes=both).logits_BTV
    np.testing.assert_allclose(changed, models.logits(model, edited, IDS), **CLOSE)


def test_a_layer_ablated_is_a_layer_that_writes_nothing():
    model, params = made()
    lost = ablation.layers(model, params, IDS, MEASURE)
    edited = jax.tree.map(lambda leaf: leaf, params)
    edited["block_0"]["mlp"]["down"]["kernel"] *= 0
    difference = measured(models.logits(model, edited, IDS)) - measured(models.logits(model, params, IDS))
    np.testing.assert_allclose(lost[0, 1], difference, **CLOSE)
    edited["block_0"]["attention"]["out"]["kernel"] *= 0
    changed = sites.forward(model, params, IDS, changes=ablation.ablate_layers([0])).logits_BTV
    np.testing.assert_allclose(changed, models.logits(model, edited, IDS), **CLOSE)


def last_block(params, x):
    """The second block and the head in NumPy, applied to a residual stream."""
    blocks = {"block_0": jax.tree.map(np.zeros_like, params["block_1"]), "block_1": params["block_1"]}
    fake = {"embedding": x.reshape(-1, x.shape[-1])}
    alone = {**params, **blocks, "tokens": fake, "positions": {"embedding": np.zeros_like(x[0])}}
    stream = written_out(alone, np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]))["block_1"]
    return normed(stream, params["final_norm"]) @ np.asarray(params["tokens"]["embedding"]).T


def test_a_patched_position_is_read_by_what_comes_after():
    model, params = made()
    clean, corrupted = written_out(params, IDS), written_out(params, OTHER)
    result = patching.by_position(model, params, OTHER, IDS, ["block_0.in", "block_1.in", "block_1"], MEASURE)
    for position in (3, 8):
        x = corrupted["block_1.in"].copy()
        x[:, position] = clean["block_1.in"][:, position]
        np.testing.assert_allclose(result[1, position], measured(last_block(params, x)), **CLOSE)
    whole, bad = measured(clean["logits"]), measured(corrupted["logits"])
    np.testing.assert_allclose(result[0, 3], whole, **CLOSE)  # there the texts differ
    np.testing.assert_allclose(result[0, 2], bad, **CLOSE)
    np.testing.assert_allclose(patching.recovered_fraction(result[:, :, 0], bad[0], whole[0])[2, 8], 1, **CLOSE)


def test_a_patched_head_changes_the_stream_by_its_own_part():
    model, params = made()
    clean, corrupted = written_out(params, IDS), written_out(params, OTHER)
    result = patching.heads(model, params, OTHER, IDS, MEASURE)
    heads = corrupted["block_0/attention/out.in"].copy()
    heads[..., 8:] = clean["block_0/attention/out.in"][..., 8:]
    x = corrupted["block_0.in"] + linear(heads, params["block_0"]["attention"]["out"])
    up = linear(normed(x, params["block_0"]["mlp_norm"]), params["block_0"]["mlp"]["up"])
    x = x + linear(np.asarray(jax.nn.gelu(up)), params["block_0"]["mlp"]["down"])
    np.testing.assert_allclose(result[0, 1], measured(last_block(params, x)), **CLOSE)


def test_a_path_to_the_head_leaves_what_is_between_alone():
    model, params = made()
    clean, corrupted = written_out(params, IDS), written_out(params, OTHER)
    result = patching.path_patching(model, params, IDS, OTHER, (0, 1), ["final_norm.in"])
    moved = corrupted["block_0/attention/out.in"] - clean["block_0/attention/out.in"]
    moved[..., :8] = 0
    stream = clean["block_1"] + linear(moved, params["block_0"]["attention"]["out"])
    expected = normed(stream, params["final_norm"]) @ np.asarray(params["tokens"]["embedding"]).T
    np.testing.assert_allclose(result, expected, **CLOSE)


def test_a_path_to_a_block_changes_what_it_reads_and_not_what_passes_by():
    model, params = made()
    clean, corrupted = written_out(params, IDS), written_out(params, OTHER)
    result = patching.path_patching(model, params, IDS, OTHER, "block_0/mlp", ["block_1/mlp_norm.in"])
    stream = clean["block_1"] - clean["block_1/mlp"]
    read = stream + corrupted["block_0/mlp"] - clean["block_0/mlp"]
    up = linear(normed(read, params["block_1"]["mlp_norm"]), params["block_1"]["mlp"]["up"])
    stream = stream + linear(np.asarray(jax.nn.gelu(up)), params["block_1"]["mlp"]["down"])
    expected = normed(stream, params["final_norm"]) @ np.asarray(params["tokens"]["embedding"]).T
    # The norm reads the stream, and what the block adds goes to the stream that was not patched.
    np.testing.assert_allclose(result, expected, **CLOSE)


def test_a_receiver_that_is_nowhere_is_named():
    model, params = made()
    with pytest.raises(DataError, match="no site 'block_9.in'"):
        patching.path_patching(model, params, IDS, OTHER, (0, 1), ["final_norm.in", "block_9.in"])
