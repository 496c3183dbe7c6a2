"""Attention on NVIDIA GPUs: cuDNN's flash attention (arXiv 2307.08691), asked for by name, never fallen back from in
silence."""

from functools import partial
from typing import Any

import jax

from gptjax.models import axes
from gptjax.models.kernels import head, plain
from gptjax.models.kernels.plain import Sight

# Tensor cores want both sides of a product in multiples; 128 is what nanoGPT's 50,304 is one of.
SLICING = head.Slicing(logit_bytes=2**30, multiple=128)
cross_entropy = partial(head.cross_entropy, slicing=SLICING)
token_loss = partial(head.token_loss, slicing=SLICING)


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


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, sight: Sight) -> jax.Array:
    """As gptjax.models.kernels.plain.attend, by cuDNN where it can; `attention_plan` says beforehand whether."""
    window = sight.window
    positions = "none" if sight.slopes_H is None else "alibi"
    dropped, packed = float(sight.drop is not None), sight.segments_BT is not None
    why = refusal(q_BTHK.shape[-1], q_BTHK.dtype, positions, dropped, isinstance(window, int), packed)
    if why or sight.is_plain or not isinstance(window, int):
        return plain.attend(q_BTHK, k_BTGK, v_BTGK, sight)
    flash = partial(
        jax.nn.dot_product_attention,
        scale=sight.scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    layout = axes.current()
    if layout is None:
        return flash(q_BTHK, k_BTGK, v_BTGK)
    return layout.per_device(flash, ("BTHK", "BSGK", "BSGK"), q_BTHK, k_BTGK, v_BTGK)


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """What computes attention, and why not cuDNN."""
    why = refusal(config.head_width, dtype, config.positions, config.dropout, plain.windows_known(config), packed)
    return f"plain: {why}" if why else "cuDNN's flash attention"
