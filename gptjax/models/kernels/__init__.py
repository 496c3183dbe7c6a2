"""The performance-critical operations of a model: reference formulas, and implementations tuned for a platform.

`KERNELS[config.kernels]` selects the implementations. All of them compute what the reference does, and fall back to it
where they do not apply. Independent of parameters and models.
"""

import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from gptjax.models.kernels import cpu, cpu_decode, gpu, reference, tpu
from gptjax.models.kernels.reference import Elementwise


class Kernels(NamedTuple):
    """One implementation of each operation, documented in gptjax.models.kernels.reference."""

    product: Callable[[jax.Array, jax.Array, str, str], jax.Array]
    normalize: Callable[[jax.Array, jax.Array, float, bool], jax.Array]
    activate: Callable[[Elementwise], Elementwise]
    attend: Callable[..., jax.Array]
    cross_entropy: Callable[..., jax.Array]
    token_loss: Callable[..., reference.TokenLoss]
    attention_plan: Callable[..., str]  # one line on what computes attention, and why nothing faster does
    compiler_options: Callable[[str], dict[str, str]]  # of XLA, for a train step in a dtype
    unembed: Callable[..., jax.Array] = reference.unembed
    ragged_product: Callable[..., jax.Array] = reference.ragged_product
    transposed: bool = False  # True if the kernels of products are stored [out, in]


REFERENCE = Kernels(
    product=reference.product,
    normalize=reference.normalize,
    activate=reference.activate,
    attend=reference.attend,
    cross_entropy=reference.cross_entropy,
    token_loss=reference.token_loss,
    attention_plan=reference.attention_plan,
    compiler_options=reference.compiler_options,
)

KERNELS: dict[str, Kernels] = {
    "plain": REFERENCE,
    "cpu": Kernels(
        product=cpu.product,
        normalize=cpu.normalize,
        activate=cpu.activate,
        attend=cpu.attend,
        cross_entropy=cpu.cross_entropy,
        token_loss=cpu.token_loss,
        attention_plan=cpu.attention_plan,
        compiler_options=cpu.compiler_options,
    ),
    "gpu": REFERENCE._replace(
        attend=gpu.attend,
        cross_entropy=gpu.cross_entropy,
        token_loss=gpu.token_loss,
        attention_plan=gpu.attention_plan,
    ),
    "tpu": REFERENCE._replace(ragged_product=tpu.ragged_product),
}
KERNELS["cpu_decode"] = KERNELS["cpu"]._replace(product=cpu_decode.product, unembed=cpu_decode.unembed, transposed=True)

# Replacements for kernels whose gradient cannot be differentiated again.
TWICE_DIFFERENTIABLE = {"gpu": "plain", "tpu": "plain"}

FOR_DECODING = {"cpu": "cpu_decode"}  # the decoding kernels of models built for training


def resolve_kernels(name: str, sharded: Collection[str] = (), platform: str = "") -> str:
    """Returns `name`, or for "auto" the fastest kernels of the platform.

    Args:
      name: of KERNELS, or "auto".
      sharded: what is sharded over devices besides rows: "sequences", "products".
      platform: the platform; "" is JAX's default backend.
    """
    if name != "auto":
        return name
    # CPU kernels concatenate and slice sharded axes, which XLA would gather first.
    backend = platform or jax.default_backend()
    return "plain" if backend not in KERNELS or (backend == "cpu" and sharded) else backend


def attention_plan(config: Any, dtype: str, packed: bool = False) -> str:
    """One line on what computes attention of `config` (`config.model`, kernels resolved) in training.

    `packed`: whether batches come with segments, several documents in a row.
    """
    if config.arch != "gpt":
        return "plain: masks are not causal alone (model.arch)"
    return KERNELS[config.kernels].attention_plan(config, dtype, packed)


def compiler_options(config: Any, dtype: str) -> dict[str, str]:
    """XLA compiler options for a train step of `config` (`config.model`), except those set in XLA_FLAGS."""
    options = KERNELS[resolve_kernels(config.kernels)].compiler_options(dtype)
    return {name: value for name, value in options.items() if name not in os.environ.get("XLA_FLAGS", "")}
