"""Position-wise feed-forward layers, dense or a mixture of experts: x_BTD in, [B, T, D] out.

A mixture of experts routes each token to k of E MLPs. Experts have no capacity limit and no token is dropped: tokens
are sorted by expert, and each product of all experts is one ragged matrix product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes, parametrization
from gptjax.models.kernels import KERNELS
from gptjax.models.layers import ACTIVATIONS, GATES, Linear, residual_std

Product = Callable[[jax.Array], jax.Array]


def feed_forward(x: jax.Array, config: Any, product: Callable[[str, int, float], Product]) -> jax.Array:
    """down(activation(up x)) (arXiv 1706.03762 eq. 2), or down(gate(gate x) * up x) (arXiv 2002.05202 eq. 5).

    Args:
      x: [..., D].
      config: `config.model`; reads activation, mlp_width, init_std, residual_init.
      product: `(name, features, init_std) -> x @ kernel`.
    """
    F, std = config.mlp_width, config.init_std
    h = product("up", F, std)(x)
    activate = KERNELS[config.kernels].activate
    if config.activation in GATES:
        gate = GATES[config.activation]
        h = activate(lambda g, h: gate(g) * h)(product("gate", F, std)(x), h)
    else:
        h = activate(ACTIVATIONS[config.activation])(h)
    return product("down", x.shape[-1], residual_std(config))(h)


class MLP(nn.Module):
    """Dense MLP; `config` is `config.model`."""

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return feed_forward(
            x_BTD, c, lambda name, features, std: Linear(features, c.use_bias, std, self.dtype, c.kernels, name=name)
        )


class ExpertLinear(nn.Module):
    """Parameters of one linear layer of all experts."""

    experts: int
    features: int
    use_bias: bool
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """Returns kernel_EDF and bias_EF for inputs of D = `width`; the bias is None without `use_bias`."""
        shape = (self.experts, width, self.features)
        kernel_EDF = logical_axes.parameter(self, "kernel", nn.initializers.normal(self.init_std), shape, self.dtype)
        if not self.use_bias:
            return kernel_EDF, None
        return kernel_EDF, logical_axes.parameter(self, "bias", nn.initializers.zeros, (self.experts, self.features))


def route(scores_NE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Selects the top k experts of each token and their weights, a softmax over those k (arXiv 1701.06538 eq. 3-5).

    Args:
      scores_NE: the router's logits, float32.
      k: experts per token.

    Returns:
      weight_Nk, which sums to one per token, and expert_Nk, best first.
    """
    best_Nk, expert_Nk = jax.lax.top_k(scores_NE, k)
    return jax.nn.softmax(best_Nk, axis=-1), expert_Nk


def load_balance(scores_NE: jax.Array, expert_Nk: jax.Array) -> jax.Array:
    """Load balancing loss: E * sum over experts of (fraction of tokens) * (mean probability) (arXiv 2101.03961 eq. 4).

    1 for a uniform assignment, E at worst.

    Args:
      scores_NE: the router's logits.
      expert_Nk: the selected experts.
    """
    E = scores_NE.shape[-1]
    fraction_E = jax.nn.one_hot(expert_Nk, E).mean(range(expert_Nk.ndim))
    probability_E = jax.nn.softmax(scores_NE, axis=-1).mean(range(scores_NE.ndim - 1))
    return E * jnp.sum(logical_axes.batch_mean(fraction_E) * logical_axes.batch_mean(probability_E))


def router_z(scores_NE: jax.Array) -> jax.Array:
    """Router z-loss: mean over tokens of logsumexp(logits)^2, which keeps logits small (arXiv 2202.08906 eq. 5)."""
    return logical_axes.batch_mean(jnp.mean(jax.nn.logsumexp(scores_NE, axis=-1) ** 2))


ExpertParams = dict[str, tuple[jax.Array, jax.Array | None]]  # kernel and bias of each linear layer, by its name


def apply_experts(
    x_BTD: jax.Array,
    expert_BTk: jax.Array,
    weight_BTk: jax.Array,
    params: ExpertParams,
    config: Any,
    first: Any,
    add: Any,
) -> jax.Array:
    """Applies the local experts to their tokens and sums the outputs by routing weight: [B, T, D].

    Args:
      x_BTD: tokens.
      expert_BTk, weight_BTk: from `route`.
      params: of the local experts.
      config: `config.model`.
      first: the number of the first local expert.
      add: sums partial products over devices that shard the rows of the down projection.
    """
    D, k, E = x_BTD.shape[-1], config.experts_per_token, params["up"][0].shape[0]
    x_ND, expert_M, weight_M1 = x_BTD.reshape(-1, D), expert_BTk.reshape(-1) - first, weight_BTk.reshape(-1, 1)
    # One row per choice, M = N * k, sorted by expert; those of experts on other devices come last.
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)
    order = jnp.argsort(expert_M)
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E]

    def product(name: str, features: int, std: float) -> Product:
        kernel_EDF, bias_EF = params[name]

        def rows(x_MD: jax.Array) -> jax.Array:
            y_MF = KERNELS[config.kernels].ragged_product(x_MD, kernel_EDF.astype(x_MD.dtype), sizes_E)
            y_MF = add(y_MF) if name == "down" else y_MF
            return y_MF if bias_EF is None else y_MF + bias_EF.astype(y_MF.dtype)[expert_M[order]]

        return rows

    sorted_y = feed_forward(x_ND[order // k], config, product)
    y_MD = sorted_y[jnp.argsort(order)]
    y_MD = jnp.where(expert_M[:, None] < E, y_MD * weight_M1.astype(y_MD.dtype), 0)
    return y_MD.reshape(-1, k, D).sum(1).reshape(x_BTD.shape)


def apply_experts_sharded(
    layout: logical_axes.Layout, x: Any, expert: Any, weight: Any, params: ExpertParams, config: Any
) -> Any:
    """`apply_experts` on several devices, each sorting its own tokens, so that no sort crosses devices.

    With expert parallelism devices all-gather their tokens, apply their own experts, and reduce-scatter the sums: no
    token is dropped, however uneven the routing is.
    """
    (among,), columns = layout.computed["E"], layout.computed["F"]
    experts_sharded, columns_sharded = layout.is_sharded((among,)), layout.is_sharded(columns)

    def local(x: Any, expert: Any, weight: Any, params: ExpertParams) -> jax.Array:
        add = partial(jax.lax.psum, axis_name=columns) if columns_sharded else lambda y: y
        if not experts_sharded:
            return apply_experts(x, expert, weight, params, config, 0, add)
        x, expert, weight = (jax.lax.all_gather(a, among, tiled=True) for a in (x, expert, weight))
        first = jax.lax.axis_index(among) * params["up"][0].shape[0]
        y_BTD = apply_experts(x, expert, weight, params, config, first, add)
        return jax.lax.psum_scatter(y_BTD, among, tiled=True)

    bias = config.use_bias
    up, down = ("EDF", "EF" if bias else None), ("EFD", "ED" if bias else None)
    letters = {name: down if name == "down" else up for name in params}
    return layout.per_device(local, ("BTD", "BT_", "BT_", letters), x, expert, weight, params)


class Experts(nn.Module):
    """A mixture of experts with a float32 router; `config` is `config.model`.

    Sows its losses into the collection "losses", each times its factor of the config, and their values into "metrics".
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        scores_BTE = Linear(c.experts, use_bias=False, init_std=c.init_std, name="router")(x_BTD)
        scores_BTE = scores_BTE * parametrization.output_multiplier(c)
        weight_BTk, expert_BTk = route(scores_BTE, c.experts_per_token)
        self._record("load_balance", load_balance(scores_BTE, expert_BTk), c.load_balance_loss)
        self._record("router_z", router_z(scores_BTE), c.router_z_loss)
        D, F = x_BTD.shape[-1], c.mlp_width

        def linear(name: str, width: int, features: int, std: float) -> tuple[jax.Array, jax.Array | None]:
            return ExpertLinear(c.experts, features, c.use_bias, std, self.dtype, name=name)(width)

        params = {"up": linear("up", D, F, c.init_std)}
        if c.activation in GATES:
            params["gate"] = linear("gate", D, F, c.init_std)
        params["down"] = linear("down", F, D, residual_std(c))
        layout = logical_axes.current()
        if layout is None:
            return apply_experts(x_BTD, expert_BTk, weight_BTk, params, c, 0, lambda y: y)
        return apply_experts_sharded(layout, x_BTD, expert_BTk, weight_BTk, params, c)

    def _record(self, name: str, value: jax.Array, factor: float) -> None:
        add, zero = (lambda old, new: old + new), lambda: jnp.zeros(())
        self.sow("losses", name, factor * value, reduce_fn=add, init_fn=zero)
        self.sow("metrics", name, value, reduce_fn=add, init_fn=zero)


MLPS: dict[str, type[nn.Module]] = {"dense": MLP, "experts": Experts}
