"""The position-wise part of a block, dense or a mixture of experts: x_BTD in, [B, T, D] out, no position sees another.

A mixture of experts sends each token to a few of E MLPs. No expert has a capacity and no token is dropped: tokens are
sorted by expert and each expert's run of rows is one product of a ragged one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

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


class RaggedLinear(nn.Module):
    """Rows sorted by expert, each through its expert's own matrix: [N, D] -> [N, features]."""

    experts: int
    features: int
    use_bias: bool
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, x_ND: jax.Array, sizes_E: jax.Array, expert_N: jax.Array) -> jax.Array:
        """Products of rows with their experts' matrices.

        Args:
          x_ND: rows of expert 0, then of expert 1, ...
          sizes_E: how many rows each has.
          expert_N: whose each row is.
        """
        shape = (self.experts, x_ND.shape[-1], self.features)
        kernel_EDF = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        y_NF = jax.lax.ragged_dot(x_ND.astype(self.dtype), kernel_EDF.astype(self.dtype), sizes_E)
        if self.use_bias:
            bias_EF = self.param("bias", nn.initializers.zeros, (self.experts, self.features), jnp.float32)
            y_NF += bias_EF.astype(self.dtype)[expert_N]
        return y_NF


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
    chosen_E = jax.nn.one_hot(expert_Nk, E).mean((0, 1))
    return E * jnp.sum(chosen_E * jax.nn.softmax(scores_NE, axis=-1).mean(0))


def router_z(scores_NE: jax.Array) -> jax.Array:
    """Mean over tokens of (log of the sum of exp(logits))^2 (arXiv 2202.08906 eq. 5), which keeps logits small."""
    return jnp.mean(jax.nn.logsumexp(scores_NE, axis=-1) ** 2)


class Experts(nn.Module):
    """A mixture of experts; `config` is `config.model`, with a router in float32.

    Its losses go to the collection "losses", each times its factor of the config, and their bare values to "metrics".
    """

    config: Any
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, E, k = x_BTD.shape[-1], c.experts, c.experts_per_token
        x_ND = x_BTD.reshape(-1, D)
        scores_NE = Linear(E, use_bias=False, init_std=c.init_std, name="router")(x_ND)
        share_Nk, expert_Nk = route(scores_NE, k)
        self._record("load_balance", load_balance(scores_NE, expert_Nk), c.load_balance_loss)
        self._record("router_z", router_z(scores_NE), c.router_z_loss)

        # One row per choice, sorted by expert; a token's k rows are next to each other before that.
        expert_of_row = expert_Nk.reshape(-1)
        order = jnp.argsort(expert_of_row)
        sizes_E = jnp.bincount(expert_of_row, length=E)

        def product(name: str, features: int, std: float) -> Product:
            ragged = RaggedLinear(E, features, c.use_bias, std, self.dtype, name=name)
            return lambda rows: ragged(rows, sizes_E, expert_of_row[order])

        sorted_y = feed_forward(x_ND[order // k], c, product)
        y_NkD = sorted_y[jnp.argsort(order)].reshape(-1, k, D)
        return jnp.einsum("nkd,nk->nd", y_NkD, share_Nk.astype(y_NkD.dtype)).reshape(x_BTD.shape)

    def _record(self, name: str, value: jax.Array, factor: float) -> None:
        add, zero = (lambda old, new: old + new), lambda: jnp.zeros(())
        self.sow("losses", name, factor * value, reduce_fn=add, init_fn=zero)
        self.sow("metrics", name, value, reduce_fn=add, init_fn=zero)


MLPS: dict[str, type[nn.Module]] = {"dense": MLP, "experts": Experts}
