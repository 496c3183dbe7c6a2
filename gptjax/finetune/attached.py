"""Parameter-efficient additions to modules: small parameters under a module's path, and their effect on its output.

A model built with `attached=Attached(...)` looks for them wherever it is applied; a module without them computes what
it does in the base model. gptjax.finetune.methods decides which modules have them.

    lora_a [D, r], lora_b [r, F]    added to a product with a kernel [D, F]; AdaLoRA has lora_e [r] between them
    dora [F]                        change of each column's norm relative to the kernel's
    ia3_kv [G, 2, K], ia3_in [F]    factors of keys and values, and of the input of an MLP's last product
    adapter_down [D, m], adapter_up [m, D], and biases    a bottleneck MLP after a sublayer, or parallel to it
    prefix_k, prefix_v [P, G, K]    keys and values that every token attends to
    prompt [P, D]                   rows of the token embedding for P ids after the vocabulary

Those of experts and stacked layers have further leading axes.
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
    """Settings of the additions; a Linen interceptor (`nn.intercept_methods`). Compares equal by value."""

    scale: float = 1.0  # of LoRA's product: alpha / r, or alpha / sqrt(r)
    dropout: float = 0.0  # on the input of LoRA's product
    parallel: bool = False  # adapters read the input of the sublayer, not its output
    prompt_length: int = 0  # P: number of ids after the vocabulary

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        """Calls the method with the module's additions."""
        intercept = INTERCEPTORS.get((type(context.module), context.method_name))
        return intercept(self, context.module, call, *args, **kwargs) if intercept else call(*args, **kwargs)


def get_param(module: nn.Module, name: str) -> Any:
    """Returns the module's parameter of that name, or None."""
    return module.get_variable("params", name)


def linear(attached: Attached, module: Linear, call: Callable[..., Any], x: jax.Array) -> jax.Array:
    """Computes y = x W + b with LoRA (arXiv 2106.09685 eq. 3), DoRA (arXiv 2402.09353 eq. 5) and IA3's factors."""
    factor_in, factor_G2K, a_Dr = (get_param(module, name) for name in ("ia3_in", "ia3_kv", "lora_a"))
    y = call(x if factor_in is None else x * factor_in.astype(x.dtype))
    if factor_G2K is not None:
        y = scale_keys_and_values(y, factor_G2K)
    if a_Dr is not None:
        y = add_lora(attached, module, x, y, a_Dr)
    return y


def scale_keys_and_values(y: jax.Array, factor_G2K: jax.Array) -> jax.Array:
    """Scales keys and values; y has the columns of each key head, queries first if there are any."""
    G, _, K = factor_G2K.shape
    grouped = y.reshape(*y.shape[:-1], G, -1, K)
    return grouped.at[..., -2:, :].multiply(factor_G2K.astype(y.dtype)).reshape(y.shape)


def add_lora(attached: Attached, module: Linear, x: jax.Array, y: jax.Array, a_Dr: jax.Array) -> jax.Array:
    """Computes y + scale x A B, with DoRA scaled to its column norms."""
    b_rF, e_r, dora_F = (get_param(module, name) for name in ("lora_b", "lora_e", "dora"))
    h = dropout(x, attached.dropout, module) @ a_Dr.astype(x.dtype)
    if e_r is not None:
        h = h * e_r.astype(x.dtype)
    y = y + (attached.scale * (h @ b_rF.astype(x.dtype))).astype(y.dtype)
    if dora_F is None:
        return y
    kernel_DF, bias_F = get_param(module, "kernel"), get_param(module, "bias")
    growth_F = dora_growth(kernel_DF, kernel_DF + lora_product(attached.scale, a_Dr, b_rF, e_r), dora_F).astype(y.dtype)
    return y + growth_F * (y if bias_F is None else y - bias_F.astype(y.dtype))


def dora_growth(kernel: jax.Array, summed: jax.Array, dora: jax.Array) -> jax.Array:
    """Computes the relative growth [F] of a sum's columns [D, F] to the norms of the kernel's columns plus `dora`.

    No gradient flows through the sum's own norms (arXiv 2402.09353 section 4.3).
    """
    target, norm = (jnp.linalg.norm(x, axis=-2) for x in (kernel, jax.lax.stop_gradient(summed)))
    return (target - norm + dora) / norm


def merge_lora(scale: float, kernel: jax.Array, a: jax.Array, b: jax.Array, e: Any, dora: Any) -> jax.Array:
    """Returns matrices [..., D, F] with LoRA's product added; e is None but for AdaLoRA, and dora but for DoRA."""
    summed = kernel + lora_product(scale, a, b, e).astype(kernel.dtype)
    return summed if dora is None else summed * (1 + dora_growth(kernel, summed, dora))[..., None, :]


def lora_product(scale: float, a: jax.Array, b: jax.Array, e: jax.Array | None) -> jax.Array:
    """Computes scale A diag(e) B, [..., D, F], with any leading axes."""
    return scale * jnp.einsum("...dr,...rf->...df", a if e is None else a * e[..., None, :], b)


def dropout(x: jax.Array, rate: float, module: nn.Module) -> jax.Array:
    """Applies dropout if the module has a "dropout" generator, as in training."""
    if not rate or not module.has_rng("dropout"):
        return x
    mask = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(mask, x / (1 - rate), 0)


def recurrent_kernel(attached: Attached, module: Kernel, call: Callable[..., Any]) -> jax.Array:
    """Adds LoRA to a recurrent layer's matrix; without dropout, since a loop reads it at every step."""
    kernel, (a_Dr, *others) = call(), (get_param(module, name) for name in LORA)
    if a_Dr is None:
        return kernel
    changed_DF = merge_lora(attached.scale, kernel.T if module.transposed else kernel, a_Dr, *others)
    return changed_DF.T if module.transposed else changed_DF


def expert_kernels(attached: Attached, module: ExpertLinear, call: Callable[..., Any], width: int) -> Any:
    """Adds LoRA to each expert's matrix; without dropout."""
    (kernel_EDF, bias_EF), (a_EDr, *others) = call(width), (get_param(module, name) for name in LORA)
    return (kernel_EDF if a_EDr is None else merge_lora(attached.scale, kernel_EDF, a_EDr, *others)), bias_EF


def bottleneck(attached: Attached, module: nn.Module, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """Computes y + up(gelu(down(y))) (arXiv 1902.00751 section 2.1), or with x inside (arXiv 2110.04366, parallel)."""
    down_Dm, up_mD = get_param(module, "adapter_down"), get_param(module, "adapter_up")
    if down_Dm is None:
        return y_BTD
    x = x_BTD if attached.parallel else y_BTD
    h = x @ down_Dm.astype(x.dtype) + get_param(module, "adapter_down_bias").astype(x.dtype)
    up = jax.nn.gelu(h) @ up_mD.astype(x.dtype) + get_param(module, "adapter_up_bias").astype(x.dtype)
    return y_BTD + up.astype(y_BTD.dtype)


def attention(attached: Attached, module: Attention, call: Callable[..., Any], x_BTD: jax.Array, *more: Any) -> Any:
    """Self-attention with an adapter."""
    mixed_BTD, first_v, cache = call(x_BTD, *more)
    return bottleneck(attached, module, x_BTD, mixed_BTD), first_v, cache


def cross_attention(
    attached: Attached, module: Attention, call: Callable[..., Any], x_BTD: jax.Array, *more: Any
) -> jax.Array:
    """Cross-attention with an adapter."""
    return bottleneck(attached, module, x_BTD, call(x_BTD, *more))


def mlp(attached: Attached, module: nn.Module, call: Callable[..., Any], x_BTD: jax.Array) -> jax.Array:
    """An MLP with an adapter."""
    return bottleneck(attached, module, x_BTD, call(x_BTD))


def spec(attached: Attached, module: Attention, call: Callable[..., Any], *args: Any) -> AttentionSpec:
    """Returns the spec of self-attention with the module's prefix (arXiv 2101.00190 section 4.2)."""
    k_PGK, v_PGK = get_param(module, "prefix_k"), get_param(module, "prefix_v")
    return call(*args) if k_PGK is None else call(*args)._replace(prefix=Prefix(k_PGK, v_PGK))


def token_embedding(
    attached: Attached, module: TokenEmbedding, call: Callable[..., Any], ids_BT: jax.Array
) -> jax.Array:
    """Embeds ids of the vocabulary by the table, and those after it by the tuned prompt (arXiv 2104.08691, 2)."""
    prompt_PD = get_param(module, "prompt")
    if prompt_PD is None:
        return call(ids_BT)
    index_BT = ids_BT - module.vocabulary
    x_BTD = call(jnp.where(index_BT < 0, ids_BT, 0))
    rows_BTD = prompt_PD[jnp.maximum(index_BT, 0)].astype(x_BTD.dtype)
    return jnp.where(index_BT[..., None] < 0, x_BTD, rows_BTD)


# By module and method.
INTERCEPTORS: dict[tuple[type[nn.Module], str], Callable[..., Any]] = {
    (Linear, "__call__"): linear,
    (Kernel, "matrix"): recurrent_kernel,
    (ExpertLinear, "__call__"): expert_kernels,
    (Attention, "__call__"): attention,
    (Attention, "cross_attend"): cross_attention,
    (Attention, "spec"): spec,
    (MLP, "__call__"): mlp,
    (Experts, "__call__"): mlp,
    (TokenEmbedding, "__call__"): token_embedding,
}
