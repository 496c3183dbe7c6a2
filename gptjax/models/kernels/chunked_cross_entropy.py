"""Cross-entropy of a head whose logits never exist whole: a slice of the sequence at a time, gradient included.

The gradient of softmax and cross-entropy needs nothing that comes after the loss, so each slice's logits are made, used
for the loss and for the gradients of the head's input and table, and forgotten; nothing is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models.kernels import reference
from gptjax.models.kernels.reference import TokenLoss, softcap


class Slicing(NamedTuple):
    """How a platform likes its slices."""

    logit_bytes: int  # float32 logits that exist at once, at most
    multiple: int  # rows that are added to the table, in the program only, to make its length a multiple of this
    dot: Callable[..., jax.Array] = reference.dot  # or a faster one


def slices(B: int, T: int, V: int, logit_bytes: int) -> int:
    """The least divisor of T that keeps float32 logits [B, T / divisor, V] within so many bytes; T where none does."""
    return next((n for n in range(1, T + 1) if T % n == 0 and 4 * B * T * V <= n * logit_bytes), T)


class Asked(NamedTuple):
    """What is asked of the logits besides cross-entropy; see gptjax.models.kernels.reference.token_loss."""

    cap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0


def cross_entropy(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    slicing: Slicing,
) -> jax.Array:
    """As gptjax.models.kernels.reference.cross_entropy."""
    return _token_loss(x_BTD, table_VD, targets_BT, weights_BT, Asked(cap), slicing)[0]


def token_loss(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    smoothing: float,
    z_loss: float,
    slicing: Slicing,
) -> TokenLoss:
    """As gptjax.models.kernels.reference.token_loss."""
    asked = Asked(cap, smoothing, z_loss)
    loss, nats, hits = _token_loss(x_BTD, table_VD, targets_BT, weights_BT, asked, slicing)
    return TokenLoss(loss, jax.lax.stop_gradient(nats), jax.lax.stop_gradient(hits))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_loss(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    asked: Asked,
    slicing: Slicing,
) -> TokenLoss:
    table = _prepared(table_VD, x_BTD.dtype, slicing)
    pieces = _pieces(x_BTD, targets_BT, weights_BT, table_VD.shape[0], slicing)
    sums = jax.lax.map(lambda piece: _sums(piece, table, table_VD.shape[0], asked, slicing)[0], pieces)
    return jax.tree.map(jnp.sum, sums)


def _prepared(table_VD: jax.Array, dtype: Any, slicing: Slicing) -> jax.Array:
    return jnp.pad(table_VD.astype(dtype), ((0, -table_VD.shape[0] % slicing.multiple), (0, 0)))


def _pieces(x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, V: int, slicing: Slicing) -> Any:
    B, T, _ = x_BTD.shape
    n = slices(B, T, V, slicing.logit_bytes)
    # Along T, so that rows stay on the devices that have them.
    return jax.tree.map(lambda x: x.reshape(B, n, T // n, *x.shape[2:]).swapaxes(0, 1), (x_BTD, targets_BT, weights_BT))


def _sums(piece: Any, table_PD: jax.Array, V: int, asked: Asked, slicing: Slicing) -> tuple[TokenLoss, Any]:
    x_BtD, targets_Bt, weights_Bt = piece
    x_ND, targets_N, weights_N = x_BtD.reshape(-1, x_BtD.shape[-1]), targets_Bt.reshape(-1), weights_Bt.reshape(-1)
    with jax.named_scope("head"):
        logits_NP = slicing.dot(x_ND, table_PD, turn_y=True)
    logits_NP = softcap(logits_NP, asked.cap)
    of_all_N = logits_NP.sum(-1) / V if asked.smoothing else 0.0  # rows that were added to the table have logits of 0
    if table_PD.shape[0] > V:
        logits_NP = jnp.where(jnp.arange(table_PD.shape[0]) < V, logits_NP, -jnp.inf)
    top_N1 = logits_NP.max(-1, keepdims=True)
    e_NP = jnp.exp(logits_NP - top_N1)
    sum_N = e_NP.sum(-1)
    chosen_N = jnp.take_along_axis(logits_NP, targets_N[:, None], axis=-1)[:, 0]
    log_sum_N = jnp.log(sum_N) + top_N1[:, 0]
    nats = loss = jnp.sum((log_sum_N - chosen_N) * weights_N)
    if asked.smoothing:
        loss += asked.smoothing * jnp.sum((chosen_N - of_all_N) * weights_N)
    if asked.z_loss:
        loss += asked.z_loss * jnp.sum(log_sum_N**2 * weights_N)
    hits = jnp.sum((chosen_N >= top_N1[:, 0]) * weights_N)
    return TokenLoss(loss, nats, hits), (x_ND, logits_NP, e_NP, sum_N, log_sum_N, targets_N, weights_N)


def _forward(
    x_BTD: Any, table_VD: Any, targets_BT: Any, weights_BT: Any, asked: Asked, slicing: Slicing
) -> tuple[TokenLoss, Any]:
    V, cap = table_VD.shape[0], asked.cap
    table_PD = _prepared(table_VD, x_BTD.dtype, slicing)

    def add(total: Any, piece: Any) -> tuple[Any, jax.Array]:
        sums, dtable_PD = total
        more, saved = _sums(piece, table_PD, V, asked, slicing)
        x_ND, logits_NP, e_NP, sum_N, log_sum_N, targets_N, weights_N = saved
        hit_NP = jnp.arange(table_PD.shape[0]) == targets_N[:, None]
        share_N = weights_N / sum_N * (1 + 2 * asked.z_loss * log_sum_N if asked.z_loss else 1)
        dlogits_NP = e_NP * share_N[:, None] - jnp.where(hit_NP, (1 - asked.smoothing) * weights_N[:, None], 0.0)
        if asked.smoothing:
            dlogits_NP -= asked.smoothing / V * weights_N[:, None]
        if cap:
            dlogits_NP *= 1 - jnp.where(jnp.isfinite(logits_NP), logits_NP / cap, 0.0) ** 2  # -inf: added rows
        dlogits_NP = dlogits_NP.astype(table_PD.dtype)
        with jax.named_scope("head"):
            dx_ND = slicing.dot(dlogits_NP, table_PD).astype(x_ND.dtype)
            dtable_PD += slicing.dot(dlogits_NP, x_ND, turn_x=True)
        return (jax.tree.map(jnp.add, sums, more), dtable_PD), dx_ND.reshape(piece[0].shape)

    zero = TokenLoss(*[jnp.zeros(())] * 3), jnp.zeros(table_PD.shape, jnp.float32)
    pieces = _pieces(x_BTD, targets_BT, weights_BT, V, slicing)
    (sums, dtable_PD), dx_nBtD = jax.lax.scan(add, zero, pieces)
    return sums, (dx_nBtD.swapaxes(0, 1).reshape(x_BTD.shape), dtable_PD[:V].astype(table_VD.dtype))


def _backward(asked: Asked, slicing: Slicing, saved: Any, dsums: TokenLoss) -> tuple[jax.Array, jax.Array, None, None]:
    # Else XLA on CPU merges what others do to a gradient, such as turning it, into a bfloat16 product and cannot run.
    dx_BTD, dtable_VD = jax.lax.optimization_barrier(saved)
    dloss = dsums.loss
    return (dx_BTD * dloss).astype(dx_BTD.dtype), (dtable_VD * dloss).astype(dtable_VD.dtype), None, None


_token_loss.defvjp(_forward, _backward)
