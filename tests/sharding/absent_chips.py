"""Compiles train steps by the compilers of chips that are not here and prints what came of it, a line each: run by
test_chips.py in a process of its own, which takes itself for one on a machine of such chips.

They say memory, kernels, collectives and dtypes, and not speed: without a chip there is no autotuning.
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from gptjax.models import kernels
from gptjax.planning import compiled_plan, costs, hlo
from gptjax.planning.chips import CHIPS
from gptjax.runs import config as configs

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def devices(chip, count):
    """`count` H100s of one host, or a v5e slice of two columns."""
    if chip == "h100":
        found = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x1x{count}")
    else:
        found = topologies.get_topology_desc(f"v5e:2x{count // 2}", "tpu", chips_per_host_bounds=[2, 2, 1])
    return found.devices


def as_if_on(chip, count):
    """Makes JAX report such devices, and cuDNN as present."""
    found = devices(chip, count)
    jax.devices = lambda *of: list(found)
    jax.device_count = lambda *of: len(found)
    jax.default_backend = lambda: CHIPS[chip].platform
    cudnn.check_cudnn_version = lambda: 90800
    cudnn.check_compute_capability = lambda least: float(least) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda that: float(that) == 9.0
    return found


def products(text):
    """Counts products by the dtypes of their operands."""
    found = [one for body in hlo.computations(text)[0].values() for one in body]
    dtypes = {one.name: hlo.shapes(one.type)[0].dtype for one in found if hlo.shapes(one.type)}
    of_operands = [re.findall(r"%([\w.\-]+)", one.rest)[:2] for one in found if one.op in ("dot", "convolution")]
    return Counter(" ".join(dtypes[name] for name in names) for names in of_operands)


def compiled(chip, count, recipe, flags):
    """Figures of the step of a recipe with these flags, for the tests."""
    as_if_on(chip, count)
    built = compiled_plan.build(costs.resolve(configs.read(recipe, flags)), CHIPS[chip])
    program, seconds = compiled_plan.compile_step(built)
    text = program.as_text()
    if "DUMP" in os.environ:
        Path(os.environ["DUMP"]).write_text(text)
    return {
        "plan": kernels.attention_plan(built.config.model, built.config.train.dtype),
        "seconds": seconds,
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "calls": Counter(re.findall(r'custom_call_target="(__cudnn[^"]*)"', text)),
        "products": products(text),
        "collectives": Counter(
            re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
        ),
    }


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(compiled(*case)), flush=True)
