"""The position-wise part of a block, dense or a mixture of experts: x_BTD in, [B, T, D] out, no position sees another.

A mixture of experts sends each token to a few of E MLPs. No expert has a capacity and no token is dropped: tokens are
sorted by expert and each expert's run of rows is one product of a ragged one.
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
    """One MLP for every token; `config` is `config.model`."""

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        return feed_forward(
            x_BTD, c, lambda name, features, std: Linear(features, c.use_bias, std, self.dtype, c.kernels, name=name)
        )


class ExpertLinear(nn.Module):
    """The parameters of one linear layer of each expert."""

    experts: int
    features: int
    use_bias: bool
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        """kernel_EDF and bias_EF for inputs of D = `width`; None for a bias where there is none."""
        shape = (self.experts, width, self.features)
        kernel_EDF = logical_axes.parameter(self, "kernel", nn.initializers.normal(self.init_std), shape, self.dtype)
        if not self.use_bias:
            return kernel_EDF, None
        return kernel_EDF, logical_axes.parameter(self, "bias", nn.initializers.zeros, (self.experts, self.features))


def route(scores_NE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k experts of each token, best first, and their shares: a softmax over those k (arXiv 1701.06538 eq. 3-5).

    Args:
      scores_NE: the router's logits, float32.
      k: experts per token.

    Returns:
      share_Nk, which adds up to one per token, and expert_Nk.
    """
    best_Nk, expert_Nk = jax.lax.top_k(scores_NE, k)
    return jax.nn.softmax(best_Nk, axis=-1), expert_Nk


def load_balance(scores_NE: jax.Array, expert_Nk: jax.Array) -> jax.Array:
    """E * sum over experts of (share of choices) * (mean probability) (arXiv 2101.03961 eq. 4): 1 if even, E at worst.

    Args:
      scores_NE: the router's logits.
      expert_Nk: what was chosen.
    """
    E = scores_NE.shape[-1]
    chosen_E = jax.nn.one_hot(expert_Nk, E).mean(range(expert_Nk.ndim))
    likely_E = jax.nn.softmax(scores_NE, axis=-1).mean(range(scores_NE.ndim - 1))
    return E * jnp.sum(logical_axes.mean_of_rows(chosen_E) * logical_axes.mean_of_rows(likely_E))


def router_z(scores_NE: jax.Array) -> jax.Array:
    """Mean over tokens of (log of the sum of exp(logits))^2 (arXiv 2202.08906 eq. 5), which keeps logits small."""
    return logical_axes.mean_of_rows(jnp.mean(jax.nn.logsumexp(scores_NE, axis=-1) ** 2))


Weights = dict[str, tuple[jax.Array, jax.Array | None]]  # of each linear layer of some experts, by its name


def through_experts(
    x_BTD: jax.Array, expert_BTk: jax.Array, share_BTk: jax.Array, weights: Weights, config: Any, first: Any, add: Any
) -> jax.Array:
    """Each token through those of its experts that are here, added up by their shares: [B, T, D].

    Args:
      x_BTD: tokens.
      expert_BTk, share_BTk: as `route` gives them.
      weights: of the experts that are here.
      config: `config.model`.
      first: the number of the first expert that is here.
      add: completes the products whose kernels are here with a part of their rows only.
    """
    D, k, E = x_BTD.shape[-1], config.experts_per_token, weights["up"][0].shape[0]
    x_ND, expert_M, share_M1 = x_BTD.reshape(-1, D), expert_BTk.reshape(-1) - first, share_BTk.reshape(-1, 1)
    # One row per choice, M = N * k, sorted by expert; those of experts that are elsewhere come last.
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)
    order = jnp.argsort(expert_M)
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E]

    def product(name: str, features: int, std: float) -> Product:
        kernel_EDF, bias_EF = weights[name]

        def rows(x_MD: jax.Array) -> jax.Array:
            y_MF = KERNELS[config.kernels].ragged_product(x_MD, kernel_EDF.astype(x_MD.dtype), sizes_E)
            y_MF = add(y_MF) if name == "down" else y_MF
            return y_MF if bias_EF is None else y_MF + bias_EF.astype(y_MF.dtype)[expert_M[order]]

        return rows

    sorted_y = feed_forward(x_ND[order // k], config, product)
    y_MD = sorted_y[jnp.argsort(order)]
    y_MD = jnp.where(expert_M[:, None] < E, y_MD * share_M1.astype(y_MD.dtype), 0)
    return y_MD.reshape(-1, k, D).sum(1).reshape(x_BTD.shape)


def divided_among_devices(
    layout: logical_axes.Layout, x: Any, expert: Any, share: Any, weights: Weights, config: Any
) -> Any:
    """`through_experts` on several devices: each sorts the tokens that it has, so that no sort crosses devices.

    Devices that divide experts among them bring their tokens together, take each through the experts that they have,
    and give each device the sums of its own tokens: no token is dropped, however uneven the choices are.
    """
    (among,), columns = layout.computed["E"], layout.computed["F"]
    apart, narrow = layout.is_divided((among,)), layout.is_divided(columns)

    def own(x: Any, expert: Any, share: Any, weights: Weights) -> jax.Array:
        add = partial(jax.lax.psum, axis_name=columns) if narrow else lambda y: y
        if not apart:
            return through_experts(x, expert, share, weights, config, 0, add)
        x, expert, share = (jax.lax.all_gather(a, among, tiled=True) for a in (x, expert, share))
        first = jax.lax.axis_index(among) * weights["up"][0].shape[0]
        y_BTD = through_experts(x, expert, share, weights, config, first, add)
        return jax.lax.psum_scatter(y_BTD, among, tiled=True)

    bias = config.use_bias
    out, back = ("EDF", "EF" if bias else None), ("EFD", "ED" if bias else None)
    letters = {name: back if name == "down" else out for name in weights}
    return layout.per_device(own, ("BTD", "BT_", "BT_", letters), x, expert, share, weights)


class Experts(nn.Module):
    """A mixture of experts; `config` is `config.model`, with a router in float32.

    Its losses go to the collection "losses", each times its factor of the config, and their bare values to "metrics".
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        scores_BTE = Linear(c.experts, use_bias=False, init_std=c.init_std, name="router")(x_BTD)
        scores_BTE = scores_BTE * parametrization.multiplier(c)
        share_BTk, expert_BTk = route(scores_BTE, c.experts_per_token)
        self._record("load_balance", load_balance(scores_BTE, expert_BTk), c.load_balance_loss)
        self._record("router_z", router_z(scores_BTE), c.router_z_loss)
        D, F = x_BTD.shape[-1], c.mlp_width

        def linear(name: str, width: int, features: int, std: float) -> tuple[jax.Array, jax.Array | None]:
            return ExpertLinear(c.experts, features, c.use_bias, std, self.dtype, name=name)(width)

        weights = {"up": linear("up", D, F, c.init_std)}
        if c.activation in GATES:
            weights["gate"] = linear("gate", D, F, c.init_std)
        weights["down"] = linear("down", F, D, residual_std(c))
        layout = logical_axes.current()
        if layout is None:
            return through_experts(x_BTD, expert_BTk, share_BTk, weights, c, 0, lambda y: y)
        return divided_among_devices(layout, x_BTD, expert_BTk, share_BTk, weights, c)

    def _record(self, name: str, value: jax.Array, factor: float) -> None:
        add, zero = (lambda old, new: old + new), lambda: jnp.zeros(())
        self.sow("losses", name, factor * value, reduce_fn=add, init_fn=zero)
        self.sow("metrics", name, value, reduce_fn=add, init_fn=zero)


MLPS: dict[str, type[nn.Module]] = {"dense": MLP, "experts": Experts}
