"""Cross-entropy, and its gradient, computed in chunks of the sequence, so that the logits are never held in full.

The gradient of softmax and cross-entropy depends on nothing after the loss: each chunk's logits are used for the loss
and for the gradients of hidden states and unembedding, and then discarded; nothing is recomputed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models.kernels import reference
from gptjax.models.kernels.reference import TokenLoss, softcap


class Chunking(NamedTuple):
    """Chunk size and matrix product of a platform."""

    logit_bytes: int  # the maximum size of a chunk's float32 logits
    multiple: int  # the unembedding is padded, within the program, to a multiple of this many rows
    dot: Callable[..., jax.Array] = reference.dot


def num_chunks(B: int, T: int, V: int, logit_bytes: int) -> int:
    """The least divisor of T that keeps float32 logits [B, T / divisor, V] within `logit_bytes`; T if none does."""
    return next((n for n in range(1, T + 1) if T % n == 0 and 4 * B * T * V <= n * logit_bytes), T)


class LossOptions(NamedTuple):
    """Options of the loss; see gptjax.models.kernels.reference.token_loss."""

    cap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0


def cross_entropy(
    x_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    chunking: Chunking,
) -> jax.Array:
    """Same as gptjax.models.kernels.reference.cross_entropy, in chunks."""
    return _token_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, LossOptions(cap), chunking)[0]


def token_loss(
    x_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    smoothing: float,
    z_loss: float,
    chunking: Chunking,
) -> TokenLoss:
    """Same as gptjax.models.kernels.reference.token_loss, in chunks."""
    options = LossOptions(cap, smoothing, z_loss)
    loss, nats, hits = _token_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, options, chunking)
    return TokenLoss(loss, jax.lax.stop_gradient(nats), jax.lax.stop_gradient(hits))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_loss(
    x_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    options: LossOptions,
    chunking: Chunking,
) -> TokenLoss:
    unembedding_PD = _pad_unembedding(unembedding_VD, x_BTD.dtype, chunking)
    chunks = _chunks(x_BTD, targets_BT, weights_BT, unembedding_VD.shape[0], chunking)
    sums = jax.lax.map(
        lambda chunk: _sums(chunk, unembedding_PD, unembedding_VD.shape[0], options, chunking)[0], chunks
    )
    return jax.tree.map(jnp.sum, sums)


def _pad_unembedding(unembedding_VD: jax.Array, dtype: Any, chunking: Chunking) -> jax.Array:
    return jnp.pad(unembedding_VD.astype(dtype), ((0, -unembedding_VD.shape[0] % chunking.multiple), (0, 0)))


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, V: int, chunking: Chunking) -> Any:
    B, T, _ = x_BTD.shape
    n = num_chunks(B, T, V, chunking.logit_bytes)
    # Along T, so that rows stay on their devices.
    return jax.tree.map(lambda x: x.reshape(B, n, T // n, *x.shape[2:]).swapaxes(0, 1), (x_BTD, targets_BT, weights_BT))


def _sums(
    chunk: Any, unembedding_PD: jax.Array, V: int, options: LossOptions, chunking: Chunking
) -> tuple[TokenLoss, Any]:
    x_BtD, targets_Bt, weights_Bt = chunk
    x_ND, targets_N, weights_N = x_BtD.reshape(-1, x_BtD.shape[-1]), targets_Bt.reshape(-1), weights_Bt.reshape(-1)
    with jax.named_scope("head"):
        logits_NP = chunking.dot(x_ND, unembedding_PD, transpose_y=True)
    logits_NP = softcap(logits_NP, options.cap)
    mean_N = logits_NP.sum(-1) / V if options.smoothing else 0.0  # logits of padding are 0
    if unembedding_PD.shape[0] > V:
        logits_NP = jnp.where(jnp.arange(unembedding_PD.shape[0]) < V, logits_NP, -jnp.inf)
    top_N1 = logits_NP.max(-1, keepdims=True)
    e_NP = jnp.exp(logits_NP - top_N1)
    sum_N = e_NP.sum(-1)
    target_logit_N = jnp.take_along_axis(logits_NP, targets_N[:, None], axis=-1)[:, 0]
    log_sum_N = jnp.log(sum_N) + top_N1[:, 0]
    nats = loss = jnp.sum((log_sum_N - target_logit_N) * weights_N)
    if options.smoothing:
        loss += options.smoothing * jnp.sum((target_logit_N - mean_N) * weights_N)
    if options.z_loss:
        loss += options.z_loss * jnp.sum(log_sum_N**2 * weights_N)
    hits = jnp.sum((target_logit_N >= top_N1[:, 0]) * weights_N)
    return TokenLoss(loss, nats, hits), (x_ND, logits_NP, e_NP, sum_N, log_sum_N, targets_N, weights_N)


def _forward(
    x_BTD: Any, unembedding_VD: Any, targets_BT: Any, weights_BT: Any, options: LossOptions, chunking: Chunking
) -> tuple[TokenLoss, Any]:
    V, cap = unembedding_VD.shape[0], options.cap
    unembedding_PD = _pad_unembedding(unembedding_VD, x_BTD.dtype, chunking)

    def add(carry: Any, chunk: Any) -> tuple[Any, jax.Array]:
        sums, dunembedding_PD = carry
        added, saved = _sums(chunk, unembedding_PD, V, options, chunking)
        x_ND, logits_NP, e_NP, sum_N, log_sum_N, targets_N, weights_N = saved
        is_target_NP = jnp.arange(unembedding_PD.shape[0]) == targets_N[:, None]
        scale_N = weights_N / sum_N * (1 + 2 * options.z_loss * log_sum_N if options.z_loss else 1)
        dlogits_NP = e_NP * scale_N[:, None] - jnp.where(
            is_target_NP, (1 - options.smoothing) * weights_N[:, None], 0.0
        )
        if options.smoothing:
            dlogits_NP -= options.smoothing / V * weights_N[:, None]
        if cap:
            dlogits_NP *= 1 - jnp.where(jnp.isfinite(logits_NP), logits_NP / cap, 0.0) ** 2  # -inf: padding
        dlogits_NP = dlogits_NP.astype(unembedding_PD.dtype)
        with jax.named_scope("head"):
            dx_ND = chunking.dot(dlogits_NP, unembedding_PD).astype(x_ND.dtype)
            dunembedding_PD += chunking.dot(dlogits_NP, x_ND, transpose_x=True)
        return (jax.tree.map(jnp.add, sums, added), dunembedding_PD), dx_ND.reshape(chunk[0].shape)

    zero = TokenLoss(*[jnp.zeros(())] * 3), jnp.zeros(unembedding_PD.shape, jnp.float32)
    chunks = _chunks(x_BTD, targets_BT, weights_BT, V, chunking)
    (sums, dunembedding_PD), dx_nBtD = jax.lax.scan(add, zero, chunks)
    return sums, (dx_nBtD.swapaxes(0, 1).reshape(x_BTD.shape), dunembedding_PD[:V].astype(unembedding_VD.dtype))


def _backward(
    options: LossOptions, chunking: Chunking, saved: Any, dsums: TokenLoss
) -> tuple[jax.Array, jax.Array, None, None]:
    # Without the barrier XLA on CPU fuses later operations, such as a transposition, into a bfloat16 product that it
    # cannot run.
    dx_BTD, dunembedding_VD = jax.lax.optimization_barrier(saved)
    dloss = dsums.loss
    return (dx_BTD * dloss).astype(dx_BTD.dtype), (dunembedding_VD * dloss).astype(dunembedding_VD.dtype), None, None


_token_loss.defvjp(_forward, _backward)
