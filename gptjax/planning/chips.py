"""Accelerators that a step can be planned for, from data sheets or by measuring this machine.

gptjax.training.monitoring.metrics has peak FLOP/s; here are memory and links, per device and in one direction.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gptjax.training.monitoring import metrics

GB = 10**9
# Fraction of a data sheet's dense peak that matrix products reach in a whole step, with norms, softmax and the like:
# Transformers of 22B to 530B reach 52 to 57 % of an A100's (arXiv 2205.05198, table 5: hardware FLOPs utilisation), and
# PaLM 57.8 % of a TPU v4's (arXiv 2204.02311, section 4.1), both with communication that is not overlapped.
PEAK_FRACTION = 0.6
# Fraction of a link's data sheet that large all-reduces reach, as NCCL's bus bandwidth.
LINK_FRACTION = 0.8


class Chip(NamedTuple):
    """A device and its links.

    Attributes:
      name: name of the chip, such as h100.
      kind: JAX's `device_kind`.
      platform: gpu, tpu or cpu.
      products: achievable FLOP/s of matrix products.
      memory: bytes.
      bandwidth: memory bandwidth in bytes per second.
      node: number of devices joined by near links.
      near: bytes per second that a device sends by NVLink or ICI, over all its links.
      far: bytes per second that a device sends over the network.
    """

    name: str
    kind: str
    platform: str
    products: float
    memory: float
    bandwidth: float
    node: int
    near: float
    far: float

    def is_measured(self) -> bool:
        """Returns True if the numbers were measured on this machine instead of taken from a data sheet."""
        return self.name == HERE


HERE = "here"


def _sheet(name: str, kind: str, platform: str, memory: float, bandwidth: float, node: int, near: float, far: float):  # type: ignore[no-untyped-def]
    peak = metrics.PEAK_FLOPS[kind] * PEAK_FRACTION
    return Chip(name, kind, platform, peak, memory, bandwidth, node, near * LINK_FRACTION, far * LINK_FRACTION)


# NVIDIA: data sheets of the SXM modules; far: one network card a device, 200 Gbit/s in a DGX A100, 400 in later ones.
# TPU: cloud.google.com/tpu/docs (one direction of all ICI links of a chip; a node is a pod) and, for far, the data
# centre network's share of a chip (jax-ml.github.io/scaling-book/hardware; v4's is taken to be v5p's).
_GPU, _TPU = "gpu", "tpu"
DATA_SHEETS = (
    _sheet("a100", "NVIDIA A100", _GPU, 80 * GB, 2039 * GB, 8, 300 * GB, 25 * GB),
    _sheet("h100", "NVIDIA H100", _GPU, 80 * GB, 3350 * GB, 8, 450 * GB, 50 * GB),
    _sheet("h200", "NVIDIA H200", _GPU, 141 * GB, 4800 * GB, 8, 450 * GB, 50 * GB),
    _sheet("v4", "TPU v4", _TPU, 32 * 2**30, 1228 * GB, 4096, 300 * GB, 6.25 * GB),
    _sheet("v5e", "TPU v5e", _TPU, 16 * GB, 819 * GB, 256, 200 * GB, 3.125 * GB),
    _sheet("v5p", "TPU v5p", _TPU, 95 * GB, 2765 * GB, 8960, 600 * GB, 6.25 * GB),
    _sheet("v6e", "TPU v6e", _TPU, 32 * GB, 1640 * GB, 256, 400 * GB, 12.5 * GB),
)
CHIPS = {chip.name: chip for chip in DATA_SHEETS}


def measure(config: ConfigDict, devices: int) -> Chip:
    """Measures this machine's device in two seconds; virtual devices of a CPU share its throughput.

    Args:
      config: resolved config; matrix products have the shape and dtype of its MLP, with the rows of one device.
      devices: number of devices that run a step at the same time.
    """
    device, c = jax.devices()[0], config
    shared = devices if device.platform == "cpu" else 1
    rows, dtype = max(c.data.batch_size * c.data.context // c.train.grad_accumulation // devices, 1), c.train.dtype
    x, kernel = jnp.ones((rows, c.model.width), dtype), jnp.ones((c.model.width, c.model.mlp_width), dtype)
    y = jnp.ones((2**25 if device.platform == "cpu" else 2**28,), "float32")
    flops = 2 * x.size * c.model.mlp_width / seconds_per_call(jax.jit(lambda x: x @ kernel), x) / shared
    # x + 1 reads and writes each number once.
    bandwidth = 2 * y.nbytes / seconds_per_call(jax.jit(lambda y: y + 1), y) / shared
    limit = (device.memory_stats() or {}).get("bytes_limit") or _physical_memory() / shared
    return Chip(
        HERE, device.device_kind, device.platform, flops, limit, bandwidth, devices, bandwidth / 2, bandwidth / 2
    )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds_per_call(f: Callable[[jax.Array], jax.Array], x: jax.Array, duration: float = 1.0) -> float:
    """Returns the mean time of a call over `duration` seconds; other load affects it as it affects a step."""
    jax.block_until_ready(f(x))
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() < start + duration:
        jax.block_until_ready(f(x))
        calls += 1
    return (time.perf_counter() - start) / calls
