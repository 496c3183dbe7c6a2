"""The numbers that a run reports: throughput, MFU, and the lines of metrics.jsonl."""

import math
import time
from typing import Any

import jax

# Dense bf16 peak in FLOP/s of one device, by what JAX calls it. Sources: the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

MFU_CONVENTION = "6N + 12*L*D*T FLOPs per token, N without position embeddings, of the dense bf16 peak"


def flops_per_token(params: Any, layers: int, width: int, context: int) -> float:
    """6N + 12 L D T of forward and backward pass (arXiv 2204.02311, appendix B), N without position embeddings."""
    positions = params.get("positions", {})
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    count -= sum(leaf.size for leaf in jax.tree.leaves(positions))
    return 6.0 * count + 12.0 * layers * width * context


def mfu(tokens_per_second: float, flops: float, device_kind: str, devices: int) -> float | None:
    """Model FLOP utilisation, 0 to 1, by MFU_CONVENTION; None on a device whose peak is not known."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    if not matches:
        return None
    return tokens_per_second * flops / (PEAK_FLOPS[max(matches, key=len)] * devices)


class Throughput:
    """Tokens per second of training alone: time spent otherwise is taken out with `pause`."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.steps, self.seconds = 0, 0.0
        self.total_steps, self.total_seconds = 0, 0.0
        self.since = time.monotonic()

    def pause(self) -> None:
        """Time from here to `resume` does not count."""
        self.seconds += time.monotonic() - self.since

    def resume(self) -> None:
        """Time counts again."""
        self.since = time.monotonic()

    def finished_step(self) -> None:
        """One step more is done."""
        self.steps += 1

    def lap(self) -> float:
        """Tokens per second since the lap before."""
        self.pause()
        self.resume()
        rate = self.steps * self.tokens_per_step / max(self.seconds, 1e-9)
        self.total_steps, self.total_seconds = self.total_steps + self.steps, self.total_seconds + self.seconds
        self.steps, self.seconds = 0, 0.0
        return rate

    def overall(self) -> float:
        """Tokens per second over all laps."""
        return self.total_steps * self.tokens_per_step / max(self.total_seconds, 1e-9)


def finite(loss: float) -> bool:
    """Whether a loss is a number to go on with."""
    return math.isfinite(loss)
