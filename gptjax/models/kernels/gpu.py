"""Attention on NVIDIA GPUs: cuDNN's flash attention (arXiv 2307.08691), selected explicitly; `attention_plan` reports
every fallback."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models import logical_axes
from gptjax.models.kernels import chunked_cross_entropy, reference
from gptjax.models.kernels.reference import AttentionSpec, TokenLoss

# Tensor cores are fastest with dimensions in multiples; nanoGPT pads the vocabulary to 50,304, a multiple of 128.
CHUNKING = chunked_cross_entropy.Chunking(logit_bytes=2**30, multiple=128)


def cross_entropy(
    x_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, cap: float
) -> jax.Array:
    """Same as gptjax.models.kernels.reference.cross_entropy, in chunks."""
    return token_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, cap, 0.0, 0.0).loss


def token_loss(
    x_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    smoothing: float,
    z_loss: float,
) -> TokenLoss:
    """Same as gptjax.models.kernels.reference.token_loss, in chunks."""

    def chunked(x_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> TokenLoss:
        return chunked_cross_entropy.token_loss(
            x_BTD, unembedding_VD, targets_BT, weights_BT, cap, smoothing, z_loss, CHUNKING
        )

    arrays, layout = (x_BTD, unembedding_VD, targets_BT, weights_BT), logical_axes.current()
    if layout is None or layout.parts("T", x_BTD.shape[1]) == 1:
        return chunked(*arrays)
    sequence_axes = layout.computed["T"]

    def local(*arrays: jax.Array) -> TokenLoss:  # of a device's shard of the sequences
        return jax.lax.psum(chunked(*arrays), sequence_axes)

    sums: TokenLoss = layout.per_device(local, ("BTD", "VD", "BT", "BT"), *arrays, out=("", ()), among=sequence_axes)
    return sums


def unsupported_reason(
    head_width: int, dtype: Any, positions: str, dropout: float, static_windows: bool = True, packed: bool = False
) -> str:
    """Returns the reason why cuDNN cannot compute an attention, as a message; "" if it can.

    Args:
      head_width: K.
      dtype: of queries, keys and values.
      positions: `config.positions` of the model.
      dropout: of attention weights, in training.
      static_windows: True if each layer's window is known at trace time.
      packed: True if rows hold several documents.
    """
    widest = _widest_head()
    reasons = (
        (jax.default_backend() != "gpu", "no GPU is available"),
        (str(dtype) not in ("bfloat16", "float16"), f"cuDNN's attention takes bfloat16, not {dtype} (train.dtype)"),
        (
            head_width % 8 or head_width > widest,
            f"cuDNN's attention takes head widths of a multiple of 8 up to {widest}, not {head_width}",
        ),
        (positions == "alibi", "ALiBi needs a bias for each pair of tokens"),
        (dropout, "dropout of attention weights is drawn by JAX (model.dropout)"),
        (not static_windows, "scanned layers have windows of different lengths"),
        # cuDNN takes a mask as a bias [B, 1, T, T]. JAX 0.10 requests its gradient too (jax-ml/jax#39512), for which
        # cuDNN holds [B, H, T, T] in memory, or, in some versions, has no plan; nor do all support windows with a bias.
        (packed, "packed documents need a mask, whose gradient JAX requests too, and not every cuDNN version has it"),
    )
    return next((why for refused, why in reasons if refused), "")


def _widest_head() -> int:
    kinds = {device.compute_capability for device in jax.devices() if hasattr(device, "compute_capability")}
    return 256 if kinds and min(float(kind) for kind in kinds) >= 9 else 128  # Hopper and later


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Same as gptjax.models.kernels.reference.attend, by cuDNN if it supports the attention; see `attention_plan`."""
    window = spec.window
    positions = "none" if spec.slopes_H is None else "alibi"
    dropped, packed = float(spec.drop is not None), spec.segments_BT is not None
    why = unsupported_reason(q_BTHK.shape[-1], q_BTHK.dtype, positions, dropped, isinstance(window, int), packed)
    if why or spec.needs_reference or not isinstance(window, int):
        return reference.attend(q_BTHK, k_BTGK, v_BTGK, spec)
    flash = partial(
        jax.nn.dot_product_attention,
        scale=spec.scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    layout = logical_axes.current()
    if layout is None:
        return flash(q_BTHK, k_BTGK, v_BTGK)
    # JAX compiles cuDNN's call only if no mesh axis, even of size one, is left to XLA's partitioner; and the call needs
    # whole sequences.
    parts = layout.parts("T", q_BTHK.shape[1])
    if parts > 1:
        flash = partial(ulysses_attention, flash, layout.computed["T"], parts)
    letters = ("BTHK", "BTGK", "BTGK")
    mixed_BTHK: jax.Array = layout.per_device(flash, letters, q_BTHK, k_BTGK, v_BTGK, among=layout.others)
    return mixed_BTHK


def ulysses_attention(
    attention: Callable[..., jax.Array], among: Sequence[str], parts: int, q_BtHK: jax.Array, k_BtGK: Any, v_BtGK: Any
) -> jax.Array:
    """Attention with sharded sequences: all-to-all collectives exchange sequence shards for heads, and the results back
    (DeepSpeed-Ulysses, arXiv 2309.14509).

    Args:
      attention: `(q_BTHK, k_BTGK, v_BTGK) -> [B, T, H, K]`.
      among: the mesh axes that shard sequences, within a `jax.shard_map` over them.
      parts: the number of devices along them.
      q_BtHK, k_BtGK, v_BtGK: a device's shard. Key heads are repeated for devices that share one; if the devices do
        not divide the heads, heads of zeros are added.
    """
    H, G = q_BtHK.shape[2], k_BtGK.shape[2]
    padding = -H % parts
    repeats = H // G if padding else parts // math.gcd(G, parts)

    def by_heads(x_BtHK: jax.Array) -> jax.Array:
        x_BtHK = jnp.pad(x_BtHK, ((0, 0), (0, 0), (0, padding), (0, 0)))
        return jax.lax.all_to_all(x_BtHK, among, split_axis=2, concat_axis=1, tiled=True)

    k_BtGK, v_BtGK = (jnp.repeat(x, repeats, axis=2) for x in (k_BtGK, v_BtGK))
    mixed = attention(by_heads(q_BtHK), by_heads(k_BtGK), by_heads(v_BtGK))
    return jax.lax.all_to_all(mixed, among, split_axis=1, concat_axis=2, tiled=True)[:, :, :H]


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """Describes in one line what computes attention, and why cuDNN does not."""
    why = unsupported_reason(
        config.head_width, dtype, config.positions, config.dropout, reference.static_windows(config), packed
    )
    return f"plain: {why}" if why else "cuDNN's flash attention"
