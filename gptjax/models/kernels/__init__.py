"""The hot parts of a model, as plain formulas and as the same formulas made fast for one platform.

`KERNELS[config.kernels]` gives a model all of them. The plain ones are the reference: whatever else is here equals
them, and falls back to them where it does not apply. Nothing here holds parameters or knows a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gptjax.models.kernels import cpu, gpu, plain

Elementwise = Callable[..., jax.Array]


class Kernels(NamedTuple):
    """One way to compute each hot part; gptjax.models.kernels.plain says what each gives."""

    product: Callable[[jax.Array, jax.Array, str, str], jax.Array]
    standardise: Callable[[jax.Array, jax.Array, float, bool], jax.Array]
    activate: Callable[[Elementwise], Elementwise]
    attend: Callable[..., jax.Array]
    cross_entropy: Callable[..., jax.Array]
    attention_plan: Callable[..., str]  # what computes attention, and why not something faster: for a person


PLAIN = Kernels(
    product=plain.product,
    standardise=plain.standardise,
    activate=plain.activate,
    attend=plain.attend,
    cross_entropy=plain.cross_entropy,
    attention_plan=plain.attention_plan,
)

KERNELS: dict[str, Kernels] = {
    "plain": PLAIN,
    "cpu": Kernels(
        product=cpu.product,
        standardise=cpu.standardise,
        activate=jax.checkpoint,  # its derivative is computed from its argument again: fewer passes over memory
        attend=cpu.attend,
        cross_entropy=cpu.cross_entropy,
        attention_plan=cpu.attention_plan,
    ),
    "gpu": PLAIN._replace(attend=gpu.attend, cross_entropy=gpu.cross_entropy, attention_plan=gpu.attention_plan),
}


def of_platform(platform: str) -> str:
    """The name of the kernels that are fastest on a platform by JAX's name for it."""
    return {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}.get(platform, "plain")


def attention_plan(config: Any, dtype: str) -> str:
    """One line on what computes attention of `config` (`config.model`, kernels resolved) in training."""
    return KERNELS[config.kernels].attention_plan(config, dtype)
