"""FLOPs per token and model FLOPs utilization (MFU)."""

import re
from typing import Any

import jax

# Dense bf16 peak of one device in FLOP/s, by JAX's device_kind. Sources: the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


MFU_CONVENTION = (
    "6N + 12*L*D*T FLOPs per token, D = heads * head_width, N without position embeddings and, of a mixture, with the "
    "experts of one token; of the dense bf16 peak"
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of the longest name that is a prefix of `device_kind`, in whole words; None: unknown."""
    names = [name for name in PEAK_FLOPS if re.match(re.escape(name) + r"(?![A-Za-z0-9])", device_kind)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def flops_per_token(params: Any, config: Any, context: int) -> float:
    """FLOPs per token of forward and backward pass, by MFU_CONVENTION (arXiv 2204.02311, appendix B); recurrent: 6N.

    Args:
      params: parameters or their shapes.
      config: `config.model`.
      context: T.
    """
    count = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        of_expert = config.mlp == "experts" and "mlp" in names and "router" not in names
        share = config.experts_per_token / config.experts if of_expert else 1.0
        count += 0.0 if names[0] == "positions" else leaf.size * share
    if config.arch == "recurrent":
        return 6.0 * count
    return 6.0 * count + 12.0 * config.layers * config.heads * config.head_width * context


def mfu(tokens_per_second: float, flops: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs utilization by MFU_CONVENTION, 0 to 1; None on a device whose peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else tokens_per_second * flops / (peak * devices)
