"""Attention on NVIDIA GPUs: cuDNN's flash attention (arXiv 2307.08691), asked for by name, never fallen back from in
silence."""

from functools import partial
from typing import Any

import jax

from gptjax.models.kernels import head, plain
from gptjax.models.kernels.plain import Causal

# Tensor cores want both sides of a product in multiples; 128 is what nanoGPT's 50,304 is one of.
cross_entropy = partial(head.cross_entropy, slicing=head.Slicing(logit_bytes=2**30, multiple=128, dot=plain.dot))


def refusal(head_width: int, dtype: Any, positions: str, dropout: float, windows_known: bool = True) -> str:
    """Why cuDNN cannot compute this attention, for a person; "" where it can.

    Args:
      head_width: K.
      dtype: of queries, keys and values.
      positions: the model's.
      dropout: of attention weights, in training.
      windows_known: whether each layer's window is known before the program runs.
    """
    if str(dtype) not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes bfloat16, not {dtype} (train.dtype)"
    if head_width % 8 or head_width > _widest_head():
        return f"cuDNN's attention takes head widths of a multiple of 8 up to {_widest_head()}, not {head_width}"
    if positions == "alibi":
        return "ALiBi's biases would have to be held for each pair of tokens"
    if dropout:
        return "dropout of attention weights is drawn by JAX (model.dropout)"
    if not windows_known:
        return "scanned layers have windows of different lengths"
    return ""


def _widest_head() -> int:
    kinds = {device.compute_capability for device in jax.devices() if hasattr(device, "compute_capability")}
    return 256 if kinds and min(float(kind) for kind in kinds) >= 9 else 128  # Hopper and later


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, causal: Causal) -> jax.Array:
    """As gptjax.models.kernels.plain.attend, by cuDNN where it can; `attention_plan` says beforehand whether."""
    known = isinstance(causal.window, int)
    positions = "none" if causal.slopes_H is None else "alibi"
    if refusal(q_BTHK.shape[-1], q_BTHK.dtype, positions, float(causal.drop is not None), known):
        return plain.attend(q_BTHK, k_BTGK, v_BTGK, causal)
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        scale=causal.scale,
        is_causal=True,
        local_window_size=(causal.window - 1, 0) if causal.window else None,
        implementation="cudnn",
    )


def attention_plan(config: Any, dtype: str) -> str:
    """What computes attention, and why not cuDNN."""
    known = not config.scan_layers or len(set(config.windows)) == 1
    why = refusal(config.head_width, dtype, config.positions, config.dropout, known)
    return f"plain: {why}" if why else "cuDNN's flash attention"
