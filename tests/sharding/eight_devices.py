"""Trains tiny models on 8 virtual CPU devices and prints what came, a line a mesh: run by test_mesh.py in a process of
its own, because the number of devices is chosen once."""

import json
import os
import re
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
sys.path.insert(0, "tests")

import jax
import numpy as np
from conftest import tiny_config  # before jax: it says how much to optimise

from gptjax import models, optim, sharding
from gptjax.models.kernels import gpu
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs
from gptjax.runs.train_state import init_state
from gptjax.training import mesh_checks
from gptjax.training.step import make_train_step

MODEL = dict(model_heads=4, model_width=32, optimizer_learning_rate=1e-3, data_batch_size=16, train_steps=20)
EXPERTS = MODEL | dict(model_mlp="experts")
LLAMA = MODEL | dict(
    model_kv_heads=2, model_positions="rotary", model_norm="rmsnorm", model_activation="swiglu", model_tied_head=False,
    model_scan_layers=True, model_remat="full", train_grad_accumulation=2,
)  # fmt: skip
RECURRENT = MODEL | dict(model_arch="recurrent", model_use_bias=True)
CUDNN = MODEL | dict(model_kernels="gpu", model_kv_heads=2, model_windows="(5,0)")
BFLOAT16 = MODEL | dict(train_dtype="bfloat16")
MESHES = {
    "one": (MODEL, dict(data=1)),
    "data": (MODEL, dict(data=8)),
    "fsdp": (MODEL, dict(data=1, fsdp=8)),
    "tensor": (MODEL, dict(data=1, fsdp=4, tensor=2)),
    "tensor alone": (MODEL, dict(data=1, tensor=4)),
    "hybrid": (MODEL, dict(data=2, fsdp=2, tensor=2)),
    "context": (MODEL, dict(data=2, context=4)),
    "experts, one": (EXPERTS, dict(data=1)),
    "experts, data": (EXPERTS, dict(data=8)),
    "experts, expert": (EXPERTS, dict(data=2, expert=4)),
    "experts, all": (EXPERTS, dict(data=1, fsdp=2, expert=2, tensor=2)),
    "recurrent, one": (RECURRENT, dict(data=1)),
    "recurrent, fsdp": (RECURRENT, dict(data=2, fsdp=4)),
    "llama, one": (LLAMA, dict(data=1)),
    "llama, fsdp": (LLAMA, dict(data=2, fsdp=4)),
    "llama, all": (LLAMA, dict(data=1, fsdp=2, context=2, tensor=2)),
    "cudnn, one": (CUDNN, dict(data=1)),
    "cudnn, tensor": (CUDNN, dict(data=2, fsdp=2, tensor=2)),
    "cudnn, context": (CUDNN, dict(data=1, context=8)),
    "cudnn, all": (CUDNN, dict(data=1, fsdp=2, context=2, tensor=2)),
    "bfloat16, one": (BFLOAT16, dict(data=1)),
    "bfloat16, all": (BFLOAT16, dict(data=1, fsdp=4, tensor=2)),
    "bfloat16 experts, one": (EXPERTS | BFLOAT16, dict(data=1)),
    "bfloat16 experts, all": (EXPERTS | BFLOAT16, dict(data=1, fsdp=2, expert=2, tensor=2)),
}
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(text):
    """[name, shapes of its results, path of the layer or parameter] of each collective in the program."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w\[([\d,]*)\]", match[1])]
            found.append([match[2], shapes, (re.findall(r'op_name="([^"]*)"', line) or [""])[0]])
    return found


def attends_as_cudnn(q, k, v, *, implementation, **settings):
    """cuDNN's attention computed by XLA; like cuDNN it requires that no mesh axis is left to XLA's partitioner."""
    assert implementation == "cudnn"
    left = jax.sharding.get_abstract_mesh().auto_axes
    assert not left, f"{left} are not manual"
    return attention(q, k, v, implementation="xla", **settings)


attention, jax.nn.dot_product_attention = jax.nn.dot_product_attention, attends_as_cudnn
gpu.unsupported_reason = lambda *of: ""  # float32 neither


def trained(changes, sizes):
    """Trains 20 steps and returns every figure that the tests need."""
    config = configs.with_vocabulary(tiny_config(**changes), 264)
    config = config.copy_and_resolve_references().unlock()
    config.mesh.update(sizes)
    configs.check(config, mesh_checks.problems(config, 8))
    mesh = sharding.make_mesh(**config.mesh)
    model = models.build(config.model, config.train.dtype, sharding.sharded_dimensions(mesh))
    optimizer = optim.optimizer(config)

    def start():
        return init_state(model, optimizer, 0)

    state = jax.jit(start, out_shardings=sharding.state_shardings(mesh, jax.eval_shape(start)))()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    held = {
        jax.tree_util.keystr(path): [leaf.nbytes, *sorted({shard.data.nbytes for shard in leaf.addressable_shards})]
        for path, leaf in leaves
    }
    rng, losses, step = np.random.default_rng(0), [], None
    for _ in range(20):
        ids = rng.integers(0, 24, (16, 17), np.int32)
        weights = (rng.random((16, 16)) < 0.7).astype("f")
        batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": weights}
        batch = sharding.place_batch(batch, mesh)
        step = step or make_train_step(config, causal(model), optimizer, mesh, state).lower(state, batch).compile()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    stays = [leaf.sharding for leaf in jax.tree.leaves(state)] == [leaf.sharding for _, leaf in leaves]
    return {"losses": losses, "held": held, "collectives": collectives(step.as_text()), "stays": stays}


if __name__ == "__main__":
    for name in sys.argv[1:] or MESHES:
        print(json.dumps([name, trained(*MESHES[name])]), flush=True)
