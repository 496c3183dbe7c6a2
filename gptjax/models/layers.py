"""The pieces that every model is made of: matrix product, norms, activations, the embedding of tokens.

Each is a pure function or a small Linen module; a config picks among them by name from the dictionaries below.
Parameters are float32 and cast to the compute dtype where they are used.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.kernels import KERNELS


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GPT-2's GELU, x/2 (1 + tanh u) (arXiv 1606.08415 section 2), written as x * sigmoid(2u)."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv 2109.08668 section 4
    "silu": jax.nn.silu,
}

# Of gated MLPs: the activation of one product, which a second is multiplied with (arXiv 2002.05202 section 2).
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": ACTIVATIONS["silu"],
    "geglu": ACTIVATIONS["gelu"],
    "geglu_tanh": gelu_tanh,  # T5 1.1's
}

# Standard deviation at first of the products that write to the residual stream.
RESIDUAL_INITS: dict[str, Callable[[float, int], float]] = {
    "plain": lambda std, layers: std,
    # So that the stream does not grow with depth (GPT-2, "Language Models are Unsupervised Multitask Learners", 2.3).
    "scaled": lambda std, layers: std / math.sqrt(2 * layers),
    "zero": lambda std, layers: 0.0,  # each block begins as the identity
}


def residual_std(config: Any) -> float:
    """The standard deviation that `config.residual_init` (of `config.model`) gives."""
    return RESIDUAL_INITS[config.residual_init](config.init_std, config.base_layers or config.layers)


class Linear(nn.Module):
    """y = x @ kernel + bias over the last axis: [..., D] -> [..., features], in `dtype`."""

    features: int
    use_bias: bool = True
    init_std: float = 0.02
    dtype: str = "float32"
    kernels: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernels, shape = KERNELS[self.kernels], (x.shape[-1], self.features)
        shape = shape[::-1] if kernels.turned else shape
        kernel = logical_axes.parameter(self, "kernel", nn.initializers.normal(self.init_std), shape, self.dtype)
        y = kernels.product(x, kernel, self.dtype, self.dtype)
        if self.use_bias:
            y += logical_axes.parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


def is_off(rate: Any) -> bool:
    """Whether a rate is known to be 0 before the program runs; a traced one, which another run may have, never is."""
    return not isinstance(rate, jax.core.Tracer) and not rate


class Dropout(nn.Module):
    """Sets a share of x to 0, and scales the rest so that its mean stays (arXiv 1207.0580); the rate may be traced."""

    rate: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or is_off(self.rate):
            return x
        keep = 1 - self.rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), 0)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (arXiv 1607.06450, eq. 4), statistics in float32."""

    use_bias: bool = True
    epsilon: float = 1e-5
    kernels: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = logical_axes.parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        y = KERNELS[self.kernels].normalize(x.astype(jnp.float32), scale_D, self.epsilon, True)
        if self.use_bias:
            y += logical_axes.parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / root mean square of x * scale over the last axis (arXiv 1910.07467, eq. 4); it never has a bias."""

    use_bias: bool = False  # not used: norms are made alike
    epsilon: float = 1e-5
    kernels: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = logical_axes.parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        y = KERNELS[self.kernels].normalize(x.astype(jnp.float32), scale_D, self.epsilon, False)
        return y.astype(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class TokenEmbedding(nn.Module):
    """A table of one row per token: looked up on the way in and, when tied, multiplied with on the way out."""

    vocabulary: int
    width: int
    init_std: float = 0.02
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the table E_VD."""
        init, shape = nn.initializers.normal(self.init_std), (self.vocabulary, self.width)
        self.embedding_VD = logical_axes.parameter(self, "embedding", init, shape, self.dtype)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        return logical_axes.embedding_lookup(self.embedding_VD, ids_BT).astype(self.dtype)

    def table(self) -> jax.Array:
        """What a tied head multiplies with, [V, D]; float32, or in `dtype` where it was gathered."""
        return self.embedding_VD


class Head(nn.Module):
    """An untied head's own matrix."""

    vocabulary: int
    width: int
    init_std: float = 0.02
    dtype: str = "float32"
    kernels: str = "plain"

    def setup(self) -> None:
        """Declares the kernel [D, V]."""
        init, shape = nn.initializers.normal(self.init_std), (self.width, self.vocabulary)
        shape = shape[::-1] if KERNELS[self.kernels].turned else shape
        self.kernel = logical_axes.parameter(self, "kernel", init, shape, self.dtype)

    def table(self) -> jax.Array:
        """The matrix as a tied head's, [V, D]."""
        return self.kernel if KERNELS[self.kernels].turned else self.kernel.T
