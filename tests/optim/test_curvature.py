"""Second derivatives of the train step's loss, which Sophia needs, for every kind of kernel, layer and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from gptjax import models, objectives, optim, sharding
from gptjax.models.kernels import gpu
from gptjax.objectives import normalize_weights
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state
from gptjax.training.step import make_train_step

SEQ2SEQ = dict(model_arch="seq2seq", train_objective="seq2seq", data_layout="pairs", model_encoder_layers=1)
MODELS = {
    "gpt": dict(model_kernels="cpu"),
    "plain": dict(model_kernels="plain"),
    "experts": dict(model_kernels="cpu", model_mlp="experts", model_experts=2),
    "lstm": dict(model_arch="recurrent"),
    "gru": dict(model_arch="recurrent", model_cell="gru"),
    "rnn": dict(model_arch="recurrent", model_cell="rnn"),
    # Not Bahdanau's attention, whose readout takes maxima: differences step over its edges.
    "luong": SEQ2SEQ | dict(model_encoder="gru", model_decoder="gru", model_attention="multiplicative"),
}


def loss_and_params(changes):
    """The loss as a function of parameters of about unit size, and these."""
    config = configs.with_vocabulary(tiny_config(model_layers=1, model_width=8, **changes), 11)
    model = models.build(config.model, config.train.dtype)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (2, 9))
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((2, 8), "f")}
    if config.model.arch == "seq2seq":
        batch |= {"source_BS": ids[:, ::-1], "source_segments_BS": np.ones((2, 9), "i4")}
    objective, batch = objectives.loss(config, model), normalize_weights(batch)
    params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), "f"), models.shapes(model))
    return lambda params: objective(params, batch, None)[0], params


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_hessian_vector_product_vs_finite_differences(name):
    """Along random signs, as in Hutchinson's estimate; in bfloat16 within rounding."""
    loss, params = loss_and_params(MODELS[name])
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    signs = jax.tree.unflatten(tree, [jnp.asarray(rng.choice([-1.0, 1.0], x.shape), "f") for x in leaves])
    moved = lambda by: jax.tree.map(lambda p, s: p + by * s, params, signs)
    gradient = jax.jit(jax.grad(loss))
    differences = jax.tree.map(lambda a, b: (a - b) / 0.01, gradient(moved(0.005)), gradient(moved(-0.005)))
    size = float(optax.tree.norm(differences))
    for dtype, error in {"float32": 0.01, "bfloat16": 0.1}.items():
        loss, _ = loss_and_params(MODELS[name] | dict(train_dtype=dtype))
        product = jax.jit(lambda loss=loss: jax.jvp(jax.grad(loss), (params,), (signs,))[1])()
        assert float(optax.tree.norm(optax.tree.sub(product, differences))) < error * size, dtype


def test_sophia_uses_cudnn_attention_for_the_gradient_only(monkeypatch):
    """cuDNN's attention has no second derivative. Traced as for a GPU, not run."""
    asked = []

    def cudnn(q, k, v, scale, is_causal, local_window_size, implementation):
        asked.append(implementation)
        return once(q + v)

    @jax.custom_vjp
    def once(x):
        return jax.pure_callback(lambda x: x, x, x)

    once.defvjp(lambda x: (once(x), None), lambda saved, dy: (jax.pure_callback(lambda dy: dy, dy, dy),))
    monkeypatch.setattr(gpu, "unsupported_reason", lambda *given: "")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    config = tiny_config(model_kernels="gpu", optimizer_name="sophia", train_dtype="bfloat16")
    config = configs.with_vocabulary(config, 257)
    model, optimizer, mesh = models.build(config.model, "bfloat16"), optim.optimizer(config), sharding.make_mesh()
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    dtypes = {"inputs_BT": "int32", "targets_BT": "int32", "weights_BT": "float32"}
    batch = {name: jax.ShapeDtypeStruct((4, 16), dtype) for name, dtype in dtypes.items()}
    make_train_step(config, objectives.loss(config, model), optimizer, mesh, state).trace(state, batch)
    assert set(asked) == {"cudnn"}
