"""What fine-tuning adds to modules: small parameters under a module's path, and how they change what it gives.

A model built with `attached=Attached(...)` looks for them wherever it is applied; where there are none it is the model
itself. Which modules have them is decided elsewhere (gptjax.finetune.methods): here is only what they do.

    lora_a [D, r], lora_b [r, F]    added to a product with a kernel [D, F]; lora_e [r] between them, of AdaLoRA
    dora [F]                        by how much each column of that sum is longer than the kernel's
    ia3_kv [G, 2, K], ia3_in [F]    factors of keys and values, and of what an MLP's last product reads
    adapter_down [D, m], adapter_up [m, D], and biases    a small MLP after a sublayer, or beside it
    prefix_k, prefix_v [P, G, K]    keys and values that every token reads
    prompt [P, D]                   of the table of tokens: rows of the P ids behind its own

Experts' and stacked layers' have their axes before these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models.attention import Attention
from gptjax.models.kernels.reference import AttentionSpec, Prefix
from gptjax.models.layers import Linear, TokenEmbedding
from gptjax.models.mlp import MLP, ExpertLinear, Experts
from gptjax.models.recurrent.cells import Kernel

LORA = ("lora_a", "lora_b", "lora_e", "dora")


@dataclasses.dataclass(frozen=True)
class Attached:
    """How additions count; an interceptor of Linen's (`nn.intercept_methods`). Compares equal by value."""

    scale: float = 1.0  # of what LoRA adds: alpha / r, or alpha / sqrt(r)
    dropout: float = 0.0  # of what LoRA's first product reads
    parallel: bool = False  # adapters read what the sublayer reads, not what it gives
    more_ids: int = 0  # P: how many ids behind the vocabulary are read

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """What the method gives, with the module's additions."""
        changed = CHANGES.get((type(context.module), context.method_name))
        return changed(self, context.module, call, *args, **kwargs) if changed else call(*args, **kwargs)


def own(module: nn.Module, name: str) -> Any:
    """The module's addition of that name, or None."""
    return module.get_variable("params", name)


def product(how: Attached, module: Linear, call: Callable[..., Any], x: jax.Array) -> jax.Array:
    """y = x W + b, and what LoRA adds (arXiv 2106.09685 eq. 3), DoRA makes of it (2402.09353 eq. 5), IA3 multiplies."""
    before, factor_G2K, a_Dr = (own(module, name) for name in ("ia3_in", "ia3_kv", "lora_a"))
    y = call(x if before is None else x * before.astype(x.dtype))
    if factor_G2K is not None:
        y = keys_and_values_times(y, factor_G2K)
    if a_Dr is not None:
        y = sum_with_lora(how, module, x, y, a_Dr)
    return y


def keys_and_values_times(y: jax.Array, factor_G2K: jax.Array) -> jax.Array:
    """Columns of each key head, its queries first if there are any, with keys and values times their factors."""
    G, _, K = factor_G2K.shape
    grouped = y.reshape(*y.shape[:-1], G, -1, K)
    return grouped.at[..., -2:, :].multiply(factor_G2K.astype(y.dtype)).reshape(y.shape)


def sum_with_lora(how: Attached, module: Linear, x: jax.Array, y: jax.Array, a_Dr: jax.Array) -> jax.Array:
    """y + scale x A B, or with DoRA's lengths the same with columns of these."""
    b_rF, e_r, longer_F = (own(module, name) for name in ("lora_b", "lora_e", "dora"))
    read = dropped(x, how.dropout, module) @ a_Dr.astype(x.dtype)
    if e_r is not None:
        read = read * e_r.astype(x.dtype)
    y = y + (how.scale * (read @ b_rF.astype(x.dtype))).astype(y.dtype)
    if longer_F is None:
        return y
    kernel_DF, bias_F = own(module, "kernel"), own(module, "bias")
    more_F = stretched(kernel_DF, kernel_DF + low_rank(how.scale, a_Dr, b_rF, e_r), longer_F).astype(y.dtype)
    return y + more_F * (y if bias_F is None else y - bias_F.astype(y.dtype))


def stretched(kernel: jax.Array, summed: jax.Array, longer: jax.Array) -> jax.Array:
    """By how much of itself each column [D, F] of a sum is to grow, to be as long as the kernel's and `longer`: [F].

    No gradient goes through the length that it has (arXiv 2402.09353 section 4.3).
    """
    length, now = (jnp.linalg.norm(x, axis=-2) for x in (kernel, jax.lax.stop_gradient(summed)))
    return (length - now + longer) / now


def with_lora(scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array, e: Any, longer: Any) -> jax.Array:
    """Matrices [..., D, F] with what LoRA adds to them, columns as long as DoRA has them; None: not of that kind."""
    summed = kernel + low_rank(scale, a, b, e).astype(kernel.dtype)
    return summed if longer is None else summed * (1 + stretched(kernel, summed, longer))[..., None, :]


def low_rank(scale: float, a: jax.Array, b: jax.Array, e: jax.Array | None) -> jax.Array:
    """scale A diag(e) B, [..., D, F], of as many matrices as there are."""
    return scale * jnp.einsum("...dr,...rf->...df", a if e is None else a * e[..., None, :], b)


def dropped(x: jax.Array, rate: float, module: nn.Module) -> jax.Array:
    """Dropout in training, which has random numbers of its own."""
    if not rate or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def matrix(how: Attached, module: Kernel, call: Callable[..., Any]) -> jax.Array:
    """A recurrent layer's matrix, with what LoRA adds; without dropout, for a loop reads it at every step."""
    kernel, (a_Dr, *others) = call(), (own(module, name) for name in LORA)
    if a_Dr is None:
        return kernel
    changed_DF = with_lora(how.scale, kernel.T if module.transposed else kernel, a_Dr, *others)
    return changed_DF.T if module.transposed else changed_DF


def experts_linear(how: Attached, module: ExpertLinear, call: Callable[..., Any], width: int) -> Any:
    """Each expert's matrix, with what LoRA adds; without dropout."""
    (kernel_EDF, bias_EF), (a_EDr, *others) = call(width), (own(module, name) for name in LORA)
    return (kernel_EDF if a_EDr is None else with_lora(how.scale, kernel_EDF, a_EDr, *others)), bias_EF


def bottleneck(how: Attached, module: nn.Module, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """y + up(gelu(down(y))) (arXiv 1902.00751 section 2.1), or with x inside (arXiv 2110.04366, parallel)."""
    down_Dm, up_mD = own(module, "adapter_down"), own(module, "adapter_up")
    if down_Dm is None:
        return y_BTD
    read = x_BTD if how.parallel else y_BTD
    h = read @ down_Dm.astype(read.dtype) + own(module, "adapter_down_bias").astype(read.dtype)
    more = jax.nn.gelu(h) @ up_mD.astype(read.dtype) + own(module, "adapter_up_bias").astype(read.dtype)
    return y_BTD + more.astype(y_BTD.dtype)


def attention(how: Attached, module: Attention, call: Callable[..., Any], x_BTD: jax.Array, *more: Any) -> Any:
    """Attention with an adapter."""
    mixed_BTD, first_v, kept = call(x_BTD, *more)
    return bottleneck(how, module, x_BTD, mixed_BTD), first_v, kept


def cross_attend(how: Attached, module: Attention, call: Callable[..., Any], x_BTD: jax.Array, *more: Any) -> jax.Array:
    """Attention to a memory with an adapter."""
    return bottleneck(how, module, x_BTD, call(x_BTD, *more))


def mlp(how: Attached, module: nn.Module, call: Callable[..., Any], x_BTD: jax.Array) -> jax.Array:
    """An MLP with an adapter."""
    return bottleneck(how, module, x_BTD, call(x_BTD))


def spec(how: Attached, module: Attention, call: Callable[..., Any], *args: Any) -> AttentionSpec:
    """What a sequence's attention to itself depends on: the prefix too (arXiv 2101.00190 section 4.2)."""
    k_PGK, v_PGK = own(module, "prefix_k"), own(module, "prefix_v")
    return call(*args) if k_PGK is None else call(*args)._replace(prefix=Prefix(k_PGK, v_PGK))


def embedded(how: Attached, module: TokenEmbedding, call: Callable[..., Any], ids_BT: jax.Array) -> jax.Array:
    """The table's rows of its own ids, and a tuned prompt's of those behind them (arXiv 2104.08691 section 2)."""
    prompt_PD = own(module, "prompt")
    if prompt_PD is None:
        return call(ids_BT)
    place_BT = ids_BT - module.vocabulary
    x_BTD = call(jnp.where(place_BT < 0, ids_BT, 0))
    rows_BTD = prompt_PD[jnp.maximum(place_BT, 0)].astype(x_BTD.dtype)
    return jnp.where(place_BT[..., None] < 0, x_BTD, rows_BTD)


# By module and method.
CHANGES: dict[tuple[type[nn.Module], str], Callable[..., Any]] = {
    (Linear, "__call__"): product,
    (Kernel, "matrix"): matrix,
    (ExpertLinear, "__call__"): experts_linear,
    (Attention, "__call__"): attention,
    (Attention, "cross_attend"): cross_attend,
    (Attention, "spec"): spec,
    (MLP, "__call__"): mlp,
    (Experts, "__call__"): mlp,
    (TokenEmbedding, "__call__"): embedded,
}
