"""MLPs, dense and mixtures of experts, against NumPy; a mixture of equal experts against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.models.mlp import MLP, Experts, load_balance, route, router_z


def silu(x):
    return x / (1 + np.exp(-x))


def config_of(**changes):
    return tiny_config(model_kernels="plain", **{f"model_{key}": value for key, value in changes.items()}).model


def output(module, params, x):
    return module.apply({"params": params}, jnp.asarray(x))


def drawn(module, x, seed=1):
    """Random parameters of a module, none of them zeros."""
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)


def dense(params, x, activation):
    """An MLP in NumPy."""

    def product(name, x):
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name].get("bias", 0.0))

    up = product("up", x)
    h = silu(product("gate", x)) * up if activation == "swiglu" else np.maximum(up, 0) ** 2
    return product("down", h)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_vs_reference(activation, use_bias):
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("f")
    module = MLP(config_of(activation=activation, use_bias=use_bias, mlp_width=11), "float32")
    params = drawn(module, x)
    assert params["down"]["kernel"].shape == (11, 16)
    np.testing.assert_allclose(output(module, params, x), dense(params, x, activation), atol=1e-4)


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(
    E=st.integers(1, 6),
    k=st.integers(1, 6),
    tokens=st.integers(1, 9),
    activation=st.sampled_from(["swiglu", "relu2"]),
    use_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_experts_vs_a_loop(E, k, tokens, activation, use_bias, seed):
    """Applies each token's top k experts one by one, weighted by a softmax over their logits."""
    k = min(k, E)
    x = np.random.default_rng(seed).normal(size=(1, tokens, 16)).astype("f")
    c = config_of(experts=E, experts_per_token=k, activation=activation, use_bias=use_bias, mlp_width=5)
    module = Experts(c, "float32")
    params = drawn(module, x, seed)
    expected = np.zeros_like(x)
    for t, token in enumerate(x[0]):
        scores = token @ np.asarray(params["router"]["kernel"])
        best = np.argsort(-scores, kind="stable")[:k]
        shares = np.exp(scores[best] - scores[best].max())
        for expert, share in zip(best, shares / shares.sum(), strict=True):
            own = {
                name: {leaf: value[expert] for leaf, value in params[name].items()}
                for name in params
                if name != "router"
            }
            expected[0, t] += share * dense(own, token, activation)
    np.testing.assert_allclose(output(module, params, x), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 4])
def test_equal_experts_equal_the_dense_mlp(k):
    x = np.random.default_rng(0).normal(size=(3, 7, 16)).astype("f")
    c = config_of(experts=4, experts_per_token=k, activation="swiglu", use_bias=True)
    one, mixture = MLP(c, "float32"), Experts(c, "float32")
    params = drawn(one, x)
    same = jax.tree.map(lambda p: jnp.stack([p] * 4), params) | {"router": drawn(mixture, x)["router"]}

    def outcome(module, params):
        return jax.value_and_grad(lambda x: jnp.sin(output(module, params, x)).sum())(jnp.asarray(x))

    (y, dx), (their_y, their_dx) = outcome(one, params), outcome(mixture, same)
    np.testing.assert_allclose(y, their_y, rtol=1e-5)
    np.testing.assert_allclose(dx, their_dx, atol=1e-5)
    np.testing.assert_allclose(output(one, params, x), output(mixture, same, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(N=st.integers(1, 20), E=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_routing_losses_vs_reference(N, E, k, seed):
    k = min(k, E)
    scores = 3 * np.random.default_rng(seed).normal(size=(N, E))
    share, expert = route(jnp.asarray(scores, jnp.float32), k)
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(expert, np.argsort(-scores, axis=-1)[:, :k])
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    counts = np.bincount(np.asarray(expert).ravel(), minlength=E) / (N * k)
    expected = E * sum(counts[e] * probabilities[:, e].mean() for e in range(E))
    np.testing.assert_allclose(load_balance(jnp.asarray(scores, jnp.float32), expert), expected, rtol=1e-4)
    np.testing.assert_allclose(
        router_z(jnp.asarray(scores, jnp.float32)), (np.log(np.exp(scores).sum(-1)) ** 2).mean(), rtol=1e-4
    )


def test_even_routing_has_the_least_balance_loss_and_one_expert_for_all_the_most():
    even = jnp.zeros((8, 4))
    assert float(load_balance(even, jnp.arange(8)[:, None] % 4)) == pytest.approx(1)
    crowded = jnp.array([[50.0, 0, 0, 0]] * 8)
    assert float(load_balance(crowded, jnp.zeros((8, 1), jnp.int32))) == pytest.approx(4)


@pytest.mark.slow
def test_the_losses_are_given_out_with_their_factors():
    x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype("f")
    module = Experts(config_of(experts=4, load_balance_loss=0.5, router_z_loss=0.25), "float32")
    params = drawn(module, x)
    _, output = module.apply({"params": params}, jnp.asarray(x), mutable=["losses", "metrics"])
    assert float(output["losses"]["load_balance"]) == pytest.approx(0.5 * float(output["metrics"]["load_balance"]))
    assert float(output["losses"]["router_z"]) == pytest.approx(0.25 * float(output["metrics"]["router_z"]))
