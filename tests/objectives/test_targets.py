"""Label smoothing against its definition and PyTorch; the objective, its masks and inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from gptjax import models
from gptjax.models.kernels import KERNELS
from gptjax.objectives import OBJECTIVES
from gptjax.runs import config as configs

E = 0.1


def drawn(B=2, T=6, V=11, D=4, seed=0):
    """x, table, targets, weights of some positions, one of weight 0."""
    rng = np.random.default_rng(seed)
    x_BTD, unembedding_VD = rng.normal(size=(B, T, D)).astype("f"), rng.normal(size=(V, D)).astype("f")
    weights_BT = rng.uniform(0.1, 2, (B, T)).astype("f")
    weights_BT[0, 2] = 0
    return x_BTD, unembedding_VD, rng.integers(0, V, (B, T)), weights_BT


def reference(logits_BTV, targets_BT, weights_BT, smoothed):
    """Cross-entropy with the smoothed distribution itself, in float64."""
    z = np.asarray(logits_BTV, np.float64)
    logp = z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
    V = z.shape[-1]
    wanted = (1 - smoothed) * np.eye(V)[targets_BT] + smoothed / V
    return -((wanted * logp).sum(-1) * weights_BT).sum()


@pytest.mark.parametrize("kernels", ["plain", "cpu"])
def test_smoothing_vs_torch_with_gradients(kernels):
    torch = pytest.importorskip("torch")

    def whole(x, table, targets, weights):
        return KERNELS[kernels].token_loss(x, table, targets, weights, 0.0, E, 0.0).loss

    x, table, targets, weights = drawn(seed=1)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, table)]
    logits = (theirs[0] @ theirs[1].T).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets).flatten(), label_smoothing=E, reduction="none"
    )
    expected = (losses * torch.tensor(weights).flatten()).sum()
    expected.backward()
    loss, grads = jax.value_and_grad(whole, argnums=(0, 1))(*map(jnp.asarray, (x, table, targets, weights)))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for ours, leaf in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, atol=1e-5)


def model_of(**changes):
    config = configs.with_vocabulary(tiny_config(model_arch="seq2seq", **changes), 23)
    model = models.build(config.model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.3 * rng.normal(size=s.shape).astype("f"), models.shapes(model))
    return config, model, params


def batch_of(seed=0):
    """Two rows of two pairs each, padded."""
    rng = np.random.default_rng(seed)
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2, 0]], "i4")
    sources = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2]], "i4")
    names = ("inputs_BT", "targets_BT", "source_BS")
    ids = {name: rng.integers(0, 23, (2, 8)).astype("i4") for name in names}
    weights = (segments > 0) * rng.uniform(0.5, 1.5, (2, 8))
    return ids | {"segments_BT": segments, "source_segments_BS": sources, "weights_BT": weights.astype("f")}


def test_smoothing_affects_the_loss_only():
    config, model, params = model_of()
    batch = batch_of()
    with config.unlocked():
        config.objective.label_smoothing = E
    said = models.forward(model, params, models.select_inputs(model, batch))
    logits = np.asarray(said.x_BTD) @ np.asarray(said.unembedding_VD).T
    loss, metrics = jax.jit(OBJECTIVES["seq2seq"].loss(model, config.objective))(params, batch, None)
    np.testing.assert_allclose(loss, reference(logits, batch["targets_BT"], batch["weights_BT"], E), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], reference(logits, batch["targets_BT"], batch["weights_BT"], 0), rtol=1e-5
    )


def test_padding_has_no_effect_and_a_source_has():
    config, model, params = model_of()
    loss = jax.jit(OBJECTIVES["seq2seq"].loss(model, config.objective))
    batch = batch_of()
    before = loss(params, batch, None)[0]
    hidden = {"targets_BT": "segments_BT", "inputs_BT": "segments_BT", "source_BS": "source_segments_BS"}
    for name, segments in hidden.items():
        changed = batch | {name: np.where(batch[segments] == 0, 22, batch[name]).astype("i4")}
        assert not np.array_equal(changed[name], batch[name])
        assert loss(params, changed, None)[0] == before, name
    unweighted = batch | {"weights_BT": batch["weights_BT"] * (np.arange(8) != 3)}
    silent = unweighted | {"targets_BT": np.where(np.arange(8) == 3, 1, batch["targets_BT"]).astype("i4")}
    assert loss(params, unweighted, None)[0] == loss(params, silent, None)[0] != before
    other = batch | {"source_BS": np.where(batch["source_segments_BS"] == 2, 5, batch["source_BS"]).astype("i4")}
    assert abs(loss(params, other, None)[0] - before) > 1e-3


def test_packed_pairs_do_not_attend_to_each_other():
    config, model, params = model_of()
    batch = batch_of()
    first = batch | {"weights_BT": np.where(batch["segments_BT"] == 1, batch["weights_BT"], 0).astype("f")}
    loss = jax.jit(OBJECTIVES["seq2seq"].loss(model, config.objective))
    alone = {
        name: np.where(first["source_segments_BS" if name.endswith("S") else "segments_BT"] == 1, x, 0).astype(x.dtype)
        for name, x in first.items()
    }
    np.testing.assert_allclose(loss(params, first, None)[0], loss(params, alone, None)[0], rtol=1e-5)
