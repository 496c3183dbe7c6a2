"""Attention on NVIDIA GPUs: cuDNN's flash attention (arXiv 2307.08691), asked for by name, never fallen back from in
silence."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.models import logical_axes
from gptjax.models.kernels import chunked_cross_entropy, reference
from gptjax.models.kernels.reference import AttentionSpec, TokenLoss

# Tensor cores want both sides of a product in multiples; 128 is what nanoGPT's 50,304 is one of.
SLICING = chunked_cross_entropy.Slicing(logit_bytes=2**30, multiple=128)


def cross_entropy(
    x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, cap: float
) -> jax.Array:
    """As gptjax.models.kernels.reference.cross_entropy."""
    return token_loss(x_BTD, table_VD, targets_BT, weights_BT, cap, 0.0, 0.0).loss


def token_loss(
    x_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    cap: float,
    smoothing: float,
    z_loss: float,
) -> TokenLoss:
    """As gptjax.models.kernels.reference.token_loss."""

    def sliced(x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> TokenLoss:
        return chunked_cross_entropy.token_loss(
            x_BTD, table_VD, targets_BT, weights_BT, cap, smoothing, z_loss, SLICING
        )

    arrays, layout = (x_BTD, table_VD, targets_BT, weights_BT), logical_axes.current()
    if layout is None or layout.parts("T", x_BTD.shape[1]) == 1:
        return sliced(*arrays)
    of_sequence = layout.computed["T"]

    def own(*arrays: jax.Array) -> TokenLoss:  # of the part of a sequence that a device has
        return jax.lax.psum(sliced(*arrays), of_sequence)

    found: TokenLoss = layout.per_device(own, ("BTD", "VD", "BT", "BT"), *arrays, out=("", ()), among=of_sequence)
    return found


def refusal(
    head_width: int, dtype: Any, positions: str, dropout: float, windows_known: bool = True, packed: bool = False
) -> str:
    """Why cuDNN cannot compute this attention, for a person; "" where it can.

    Args:
      head_width: K.
      dtype: of queries, keys and values.
      positions: the model's.
      dropout: of attention weights, in training.
      windows_known: whether each layer's window is known before the program runs.
      packed: whether rows hold several documents.
    """
    widest = _widest_head()
    reasons = (
        (jax.default_backend() != "gpu", "no GPU is here"),
        (str(dtype) not in ("bfloat16", "float16"), f"cuDNN's attention takes bfloat16, not {dtype} (train.dtype)"),
        (
            head_width % 8 or head_width > widest,
            f"cuDNN's attention takes head widths of a multiple of 8 up to {widest}, not {head_width}",
        ),
        (positions == "alibi", "ALiBi's biases would have to be held for each pair of tokens"),
        (dropout, "dropout of attention weights is drawn by JAX (model.dropout)"),
        (not windows_known, "scanned layers have windows of different lengths"),
        # A mask is a bias [B, 1, T, T] to cuDNN. JAX 0.10 asks for its gradient too (jax-ml/jax#39512), for which cuDNN
        # keeps [B, H, T, T] in memory, or by its version has no plan; nor has every version windows beside a bias.
        (packed, "packed documents need a mask, whose gradient JAX asks of cuDNN too, and not every version has it"),
    )
    return next((why for refused, why in reasons if refused), "")


def _widest_head() -> int:
    kinds = {device.compute_capability for device in jax.devices() if hasattr(device, "compute_capability")}
    return 256 if kinds and min(float(kind) for kind in kinds) >= 9 else 128  # Hopper and later


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, spec: AttentionSpec) -> jax.Array:
    """As gptjax.models.kernels.reference.attend, by cuDNN where it can; `attention_plan` says beforehand whether."""
    window = spec.window
    positions = "none" if spec.slopes_H is None else "alibi"
    dropped, packed = float(spec.drop is not None), spec.segments_BT is not None
    why = refusal(q_BTHK.shape[-1], q_BTHK.dtype, positions, dropped, isinstance(window, int), packed)
    if why or spec.is_plain or not isinstance(window, int):
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
    # JAX compiles cuDNN's call only where no axis of the mesh is left to XLA to divide, be it of one device; and a call
    # reads whole sequences.
    parts = layout.parts("T", q_BTHK.shape[1])
    if parts > 1:
        flash = partial(exchanging_heads, flash, layout.computed["T"], parts)
    letters = ("BTHK", "BTGK", "BTGK")
    found: jax.Array = layout.per_device(flash, letters, q_BTHK, k_BTGK, v_BTGK, among=layout.others)
    return found


def exchanging_heads(
    attention: Callable[..., jax.Array], among: Sequence[str], parts: int, q_BtHK: jax.Array, k_BtGK: Any, v_BtGK: Any
) -> jax.Array:
    """Attention to sequences of which each device has a part: for some of the heads each gets the sequences whole, and
    gives back what it computed (arXiv 2309.14509).

    Args:
      attention: `(q_BTHK, k_BTGK, v_BTGK) -> [B, T, H, K]`.
      among: the axes of the mesh that divide sequences, within a `jax.shard_map` over them.
      parts: how many devices these are.
      q_BtHK, k_BtGK, v_BtGK: a device's part. Key heads are repeated where devices that share one read it; where the
        devices do not divide the heads, heads of zeros fill up.
    """
    H, G = q_BtHK.shape[2], k_BtGK.shape[2]
    lacking = -H % parts
    repeats = H // G if lacking else parts // math.gcd(G, parts)

    def by_heads(x_BtHK: jax.Array) -> jax.Array:
        x_BtHK = jnp.pad(x_BtHK, ((0, 0), (0, 0), (0, lacking), (0, 0)))
        return jax.lax.all_to_all(x_BtHK, among, split_axis=2, concat_axis=1, tiled=True)

    k_BtGK, v_BtGK = (jnp.repeat(x, repeats, axis=2) for x in (k_BtGK, v_BtGK))
    mixed = attention(by_heads(q_BtHK), by_heads(k_BtGK), by_heads(v_BtGK))
    return jax.lax.all_to_all(mixed, among, split_axis=1, concat_axis=2, tiled=True)[:, :, :H]


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """What computes attention, and why not cuDNN."""
    why = refusal(config.head_width, dtype, config.positions, config.dropout, reference.windows_known(config), packed)
    return f"plain: {why}" if why else "cuDNN's flash attention"
