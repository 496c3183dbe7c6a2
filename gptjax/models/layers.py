"""Basic layers: linear layer, norms, activations, dropout, token embedding.

Each is a pure function or a small Linen module; a config selects them by name from the dictionaries below.
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

# Gated MLPs: the activation of the gate's product, which multiplies a second one (arXiv 2002.05202 section 2).
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": ACTIVATIONS["silu"],
    "geglu": ACTIVATIONS["gelu"],
    "geglu_tanh": gelu_tanh,  # T5 1.1
}

# Initial standard deviation of the kernels that write to the residual stream.
RESIDUAL_INITS: dict[str, Callable[[float, int], float]] = {
    "plain": lambda std, layers: std,
    # Keeps the stream from growing with depth (GPT-2, "Language Models are Unsupervised Multitask Learners", 2.3).
    "scaled": lambda std, layers: std / math.sqrt(2 * layers),
    "zero": lambda std, layers: 0.0,  # each block is initialized to the identity
}


def residual_std(config: Any) -> float:
    """Initial standard deviation of residual projections under `config.residual_init` (of `config.model`)."""
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
        shape = shape[::-1] if kernels.transposed else shape
        kernel = logical_axes.parameter(self, "kernel", nn.initializers.normal(self.init_std), shape, self.dtype)
        y = kernels.product(x, kernel, self.dtype, self.dtype)
        if self.use_bias:
            y += logical_axes.parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


def is_zero(rate: Any) -> bool:
    """Returns True if a rate is 0 at trace time; a traced rate never is."""
    return not isinstance(rate, jax.core.Tracer) and not rate


class Dropout(nn.Module):
    """Dropout (arXiv 1207.0580): zeroes elements of x at random and rescales the others; the rate may be traced."""

    rate: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or is_zero(self.rate):
            return x
        keep = 1 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(mask, x / jnp.asarray(keep, x.dtype), 0)


class LayerNorm(nn.Module):
    """Layer normalization over the last axis (arXiv 1607.06450, eq. 4), statistics in float32."""

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
    """Root mean square normalization over the last axis, without a bias (arXiv 1910.07467, eq. 4)."""

    use_bias: bool = False  # unused; all norms have the same constructor
    epsilon: float = 1e-5
    kernels: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = logical_axes.parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        y = KERNELS[self.kernels].normalize(x.astype(jnp.float32), scale_D, self.epsilon, False)
        return y.astype(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class TokenEmbedding(nn.Module):
    """Token embedding of one row per token, and with a tied head the unembedding too."""

    vocabulary: int
    width: int
    init_std: float = 0.02
    dtype: str = "float32"

    def setup(self) -> None:
        """Declares the embedding [V, D]."""
        init, shape = nn.initializers.normal(self.init_std), (self.vocabulary, self.width)
        self.embedding_VD = logical_axes.parameter(self, "embedding", init, shape, self.dtype)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        return logical_axes.embedding_lookup(self.embedding_VD, ids_BT).astype(self.dtype)

    def unembedding(self) -> jax.Array:
        """The unembedding of a tied head, [V, D]; float32, or `dtype` where it was gathered."""
        return self.embedding_VD


class Head(nn.Module):
    """Unembedding of an untied head."""

    vocabulary: int
    width: int
    init_std: float = 0.02
    dtype: str = "float32"
    kernels: str = "plain"

    def setup(self) -> None:
        """Declares the kernel [D, V]."""
        init, shape = nn.initializers.normal(self.init_std), (self.width, self.vocabulary)
        shape = shape[::-1] if KERNELS[self.kernels].transposed else shape
        self.kernel = logical_axes.parameter(self, "kernel", init, shape, self.dtype)

    def unembedding(self) -> jax.Array:
        """The unembedding, [V, D], the transposed kernel."""
        return self.kernel if KERNELS[self.kernels].transposed else self.kernel.T
