"""Chips that a step can be planned for: what one can do, by its maker's data sheet, or by measurement of this machine.

gptjax.training.monitoring.metrics has the peaks; here are memory and links, each per device and one direction.
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
# What products reach, in a whole step, of a data sheet's dense peak, with norms, softmax and the like in between:
# Transformers of 22B to 530B reach 52 to 57 % of an A100's (arXiv 2205.05198, table 5: hardware FLOPs utilisation), and
# PaLM 57.8 % of a TPU v4's (arXiv 2204.02311, section 4.1), both with exchanges that do not hide.
OF_PEAK = 0.6
# What large all-reduces reach of the links' data sheet, as NCCL's bus bandwidth.
OF_LINK = 0.8


class Chip(NamedTuple):
    """One device, and how it reaches others."""

    name: str
    kind: str  # as JAX calls it
    platform: str  # "gpu", "tpu", "cpu"
    products: float  # FLOP/s that matrix products reach
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its memory
    node: int  # devices that near links join
    near: float  # bytes per second that a device sends by NVLink or ICI, all its links together
    far: float  # bytes per second that a device sends through the network

    def is_measured(self) -> bool:
        """Whether the numbers were measured here and are not from a data sheet."""
        return self.name == HERE


HERE = "here"


def _sheet(name: str, kind: str, platform: str, memory: float, bandwidth: float, node: int, near: float, far: float):  # type: ignore[no-untyped-def]
    peak = metrics.PEAK_FLOPS[kind] * OF_PEAK
    return Chip(name, kind, platform, peak, memory, bandwidth, node, near * OF_LINK, far * OF_LINK)


# NVIDIA: data sheets of the SXM modules; far: one network card a device, 200 Gbit/s in a DGX A100, 400 in later ones.
# TPU: cloud.google.com/tpu/docs (one direction of all ICI links of a chip; a node is a pod) and, for far, the data
# centre network's share of a chip (jax-ml.github.io/scaling-book/hardware; v4's is taken to be v5p's).
_GPU, _TPU = "gpu", "tpu"
SHEETS = (
    _sheet("a100", "NVIDIA A100", _GPU, 80 * GB, 2039 * GB, 8, 300 * GB, 25 * GB),
    _sheet("h100", "NVIDIA H100", _GPU, 80 * GB, 3350 * GB, 8, 450 * GB, 50 * GB),
    _sheet("h200", "NVIDIA H200", _GPU, 141 * GB, 4800 * GB, 8, 450 * GB, 50 * GB),
    _sheet("v4", "TPU v4", _TPU, 32 * 2**30, 1228 * GB, 4096, 300 * GB, 6.25 * GB),
    _sheet("v5e", "TPU v5e", _TPU, 16 * GB, 819 * GB, 256, 200 * GB, 3.125 * GB),
    _sheet("v5p", "TPU v5p", _TPU, 95 * GB, 2765 * GB, 8960, 600 * GB, 6.25 * GB),
    _sheet("v6e", "TPU v6e", _TPU, 32 * GB, 1640 * GB, 256, 400 * GB, 12.5 * GB),
)
CHIPS = {chip.name: chip for chip in SHEETS}


def here(config: ConfigDict, devices: int) -> Chip:
    """This machine's device, measured in two seconds; virtual devices of a CPU share what it can do.

    Args:
      config: resolved; products are of the shape and dtype of its MLP's, for as many rows as one device has.
      devices: that a step would run on at once.
    """
    device, c = jax.devices()[0], config
    shared = devices if device.platform == "cpu" else 1
    rows, dtype = max(c.data.batch_size * c.data.context // c.train.grad_accumulation // devices, 1), c.train.dtype
    x, kernel = jnp.ones((rows, c.model.width), dtype), jnp.ones((c.model.width, c.model.mlp_width), dtype)
    y = jnp.ones((2**25 if device.platform == "cpu" else 2**28,), "float32")
    flops = 2 * x.size * c.model.mlp_width / seconds(jax.jit(lambda x: x @ kernel), x) / shared
    # A sum beside a copy would be fused with it; x + 1 reads and writes each number once.
    bandwidth = 2 * y.nbytes / seconds(jax.jit(lambda y: y + 1), y) / shared
    limit = (device.memory_stats() or {}).get("bytes_limit") or _physical_memory() / shared
    return Chip(
        HERE, device.device_kind, device.platform, flops, limit, bandwidth, devices, bandwidth / 2, bandwidth / 2
    )


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds(f: Callable[[jax.Array], jax.Array], x: jax.Array, during: float = 1.0) -> float:
    """Of a call, the mean over so many seconds of calls: other work slows it as it slows a step."""
    jax.block_until_ready(f(x))
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() < began + during:
        jax.block_until_ready(f(x))
        calls += 1
    return (time.perf_counter() - began) / calls
