"""The hot parts of a model, as plain formulas and as the same formulas made fast for one platform.

`KERNELS[config.kernels]` gives a model all of them. The plain ones are the reference: whatever else is here equals
them, and falls back to them where it does not apply. Nothing here holds parameters or knows a model.
"""

import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from gptjax.models.kernels import cpu, cpu_decode, gpu, reference, tpu
from gptjax.models.kernels.reference import Elementwise


class Kernels(NamedTuple):
    """One way to compute each hot part; gptjax.models.kernels.reference says what each gives."""

    product: Callable[[jax.Array, jax.Array, str, str], jax.Array]
    normalize: Callable[[jax.Array, jax.Array, float, bool], jax.Array]
    activate: Callable[[Elementwise], Elementwise]
    attend: Callable[..., jax.Array]
    cross_entropy: Callable[..., jax.Array]
    token_loss: Callable[..., reference.TokenLoss]
    attention_plan: Callable[..., str]  # what computes attention, and why not something faster: for a person
    compiler_options: Callable[[str], dict[str, str]]  # of XLA, for a train step in that dtype
    unembed: Callable[..., jax.Array] = reference.unembed
    ragged_product: Callable[..., jax.Array] = reference.ragged_product
    turned: bool = False  # whether kernels of products are stored [out, in]


PLAIN = Kernels(
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
    "plain": PLAIN,
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
    "gpu": PLAIN._replace(
        attend=gpu.attend,
        cross_entropy=gpu.cross_entropy,
        token_loss=gpu.token_loss,
        attention_plan=gpu.attention_plan,
    ),
    "tpu": PLAIN._replace(ragged_product=tpu.ragged_product),
}
KERNELS["cpu_few"] = KERNELS["cpu"]._replace(product=cpu_decode.product, unembed=cpu_decode.unembed, turned=True)

# What a gradient that is differentiated again is computed with, where a platform's own kernels give only one.
TWICE = {"gpu": "plain", "tpu": "plain"}

FOR_FEW_ROWS = {"cpu": "cpu_few"}  # what a model that was built for training reads a few rows with


def resolved(name: str, divided: Collection[str] = (), platform: str = "") -> str:
    """The name itself, or for "auto" the kernels that are fastest on the platform that JAX runs on.

    Args:
      name: of KERNELS, or "auto".
      divided: what is divided among devices, besides rows: "sequences", "products".
      platform: another one, for a program that is planned and not run.
    """
    if name != "auto":
        return name
    # Those of CPUs join and slice axes that are divided, which XLA would bring together first.
    backend = platform or jax.default_backend()
    return "plain" if backend not in KERNELS or (backend == "cpu" and divided) else backend


def attention_plan(config: Any, dtype: str, packed: bool = False) -> str:
    """One line on what computes attention of `config` (`config.model`, kernels resolved) in training.

    `packed`: whether batches come with segments, several documents in a row.
    """
    if config.arch != "gpt":
        return "plain: masks are not causal alone (model.arch)"
    return KERNELS[config.kernels].attention_plan(config, dtype, packed)


def compiler_options(config: Any, dtype: str) -> dict[str, str]:
    """What XLA is told for a train step of `config` (`config.model`), but for what a user's own XLA_FLAGS name."""
    wanted = KERNELS[resolved(config.kernels)].compiler_options(dtype)
    return {name: value for name, value in wanted.items() if name not in os.environ.get("XLA_FLAGS", "")}
