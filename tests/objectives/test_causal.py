"""The loss against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import models
from gptjax.models.kernels import reference
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs


def in_numpy(logits_BTV, targets_BT):
    """Nats of each position's target, softmax written out in float64."""
    logits = np.asarray(logits_BTV, np.float64)
    top = logits.max(-1, keepdims=True)
    log_softmax = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log_softmax, np.asarray(targets_BT)[..., None], -1)[..., 0]


@settings(max_examples=6, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    V=st.integers(1, 40),
    scale=st.sampled_from([1, 50]),
    cap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 9),
)
def test_cross_entropy_vs_reference(B, T, V, scale, cap, seed):
    rng = np.random.default_rng(seed)
    x, table, targets = rng.normal(size=(B, T, 4)), scale * rng.normal(size=(V, 4)), rng.integers(0, V, (B, T))
    weights = rng.integers(0, 3, (B, T)).astype("f")
    logits = cap * np.tanh(x @ table.T / cap) if cap else x @ table.T
    expected = (in_numpy(logits, targets) * weights).sum()
    x, table = jnp.array(x, jnp.float32), jnp.array(table, jnp.float32)
    got = jax.jit(reference.cross_entropy, static_argnums=4)(x, table, targets, weights, cap)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_weights_select_positions():
    config = configs.with_vocabulary(tiny_config(), 257)
    model = models.build(config.model)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 257, (2, 2, 8))
    nats = in_numpy(models.logits(model, params, ids), targets)
    weights = rng.integers(0, 3, (2, 8)).astype("f")
    batch = {"inputs_BT": ids, "targets_BT": targets, "weights_BT": weights}
    loss, metrics = jax.jit(causal(model))(params, batch, None)
    np.testing.assert_allclose(loss, (nats * weights).sum(), rtol=1e-5)
    assert metrics.keys() == {"loss"} and float(metrics["loss"]) == float(loss)


def test_packed_documents_do_not_attend_to_each_other():
    config = configs.with_vocabulary(tiny_config(), 257)
    model = models.build(config.model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape).astype("f"), models.shapes(model))
    ids, targets = rng.integers(0, 257, (2, 2, 8))
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2]], "i")
    batch = {"inputs_BT": ids, "targets_BT": targets, "weights_BT": np.ones((2, 8), "f")}

    @jax.jit
    def both(params, segments):
        loss, _ = causal(model)(params, batch | {"segments_BT": segments}, None)
        return loss, models.logits(model, params, ids, segments)

    (loss, logits), (whole, _) = both(params, segments), both(params, np.ones_like(segments))
    np.testing.assert_allclose(loss, in_numpy(logits, targets).sum(), rtol=1e-5)
    assert abs(loss - whole) > 1e-4 * whole


def test_router_penalty_is_in_the_loss_only():
    config = configs.with_vocabulary(tiny_config(model_mlp="experts", model_experts=4), 257)
    model = models.build(config.model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 257, (2, 2, 8))
    batch = {"inputs_BT": ids, "targets_BT": targets, "weights_BT": np.full((2, 8), 0.5, "f")}
    loss, metrics = jax.jit(causal(model))(params, batch, None)
    nats = in_numpy(models.logits(model, params, ids), targets)
    np.testing.assert_allclose(metrics["loss"], nats.sum() / 2, rtol=1e-5)
    # Means over two layers, times the weight of the batch; the penalty adds the layers up.
    penalty = 2 * (0.01 * metrics["load_balance"] + 0.001 * metrics["router_z"])
    np.testing.assert_allclose(loss - metrics["loss"], penalty, rtol=1e-3)
