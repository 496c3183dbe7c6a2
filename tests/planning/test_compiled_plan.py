"""Plans for absent meshes: predictions for 8 virtual devices against an actual run on them."""

import json
import os
import subprocess
import sys

import jax
import pytest
from conftest import BASE, ROOT, overrides, plan, tiny_config

from gptjax.optim import skip_step
from gptjax.planning import chips, compiled_plan, costs, matmuls, meshes, roofline
from gptjax.planning.roofline import Transfer, Work

H100 = chips.CHIPS["h100"]
SEEN = """
import json, sys
sys.path.insert(0, "tests")
import jax
from conftest import tiny_config
from gptjax import sharding
from gptjax.planning import chips, collectives, compiled_plan, costs

def of(**changes):
    return costs.resolve(tiny_config(data_batch_size=8, model_kernels="plain", **changes))

built = compiled_plan.build(of(mesh_data=1, mesh_fsdp=8), chips.CHIPS["h100"])
found, seconds = compiled_plan.compile_step(built)
read = compiled_plan.analyze(built, found, seconds, chips.CHIPS["h100"], 0)
assert not jax.live_arrays(), "nothing is allocated"
state = jax.jit(built.init, out_shardings=sharding.state_shardings(built.mesh, built.shapes))()
batch = sharding.place_batch(costs.random_batch(built.config), built.mesh)

def on_first(tree):
    device = jax.devices()[0]
    leaves = jax.tree.leaves(tree)
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == device)

def whole(named=""):
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    return sum(leaf.nbytes for path, leaf in leaves if named in str(path))

half = compiled_plan.build(of(mesh_data=1, mesh_fsdp=8, train_dtype="bfloat16"), chips.CHIPS["h100"])
flops = {}
cube = dict(mesh_data=2, mesh_tensor=2)
for mesh in (dict(mesh_data=8), cube | dict(mesh_fsdp=2), cube | dict(mesh_context=2)):
    flops[str(mesh)] = costs.plan(of(**mesh)).flops.total()
print(json.dumps({
    "foreseen": read.memory._asdict(),
    "arguments": found.memory_analysis().argument_size_in_bytes,
    "temporaries": found.memory_analysis().temp_size_in_bytes,
    "real": {"parameters": on_first(state.params), "optimizer": on_first(state.opt_state), "batch": on_first(batch)},
    "whole": whole(),
    "float32": whole("norm") + whole("positions"),
    "gathered": sum(one.bytes * one.times for one in read.collectives if one.op == "all-gather"),
    "gathered_half": sum(
        one.bytes * one.times
        for one in collectives.collectives(compiled_plan.compile_step(half)[0].as_text(), dict(half.mesh.shape))
        if one.op == "all-gather"
    ),
    "axes": sorted({one.axes for one in read.collectives}),
    "flops": flops,
    "alone": costs.plan(of(mesh_data=1)).flops.total(),
}))
"""


@pytest.fixture(scope="module")
def seen():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SEEN], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_each_parameter_is_gathered_once_in_the_dtype_of_the_arithmetic(seen):
    assert seen["axes"] == [["fsdp"]]
    assert seen["gathered"] == seen["whole"]
    assert seen["gathered_half"] == (seen["whole"] - seen["float32"]) / 2 + seen["float32"]


@pytest.mark.slow
def test_bytes_of_a_device_are_those_of_the_arrays_of_a_run(seen):
    real = seen["real"]
    assert {name: seen["foreseen"][name] for name in real} == real
    counters = 4 + sum(leaf.nbytes for leaf in jax.tree.leaves(skip_step.init_guard()))
    assert seen["arguments"] == sum(real.values()) + counters, (
        "the step's number and the guard are all there is besides"
    )
    assert seen["foreseen"]["temporaries"] >= seen["temporaries"] > 0


@pytest.mark.slow
def test_flops_do_not_depend_on_the_mesh(seen):
    assert seen["alone"] > 0 and set(seen["flops"].values()) == {seen["alone"]}


def test_the_roofline_on_round_numbers():
    chip = H100._replace(products=100.0, bandwidth=10.0, node=2, near=4.0, far=1.0)
    sent = [Transfer(("tensor",), (0, 1), 8.0), Transfer(("fsdp",), (0, 2), 3.0)]
    sent += [Transfer(("data", "tensor"), (0, 1, 2, 3), 2.0)]
    work = Work(flops=400, model_flops=0.0, tokens=60)
    found = roofline.forecast(work, 4, 20.0, sent, chip)
    assert (found.products, found.elsewhere, found.waited, found.hidden) == (1.0, 2.0, 2.0 + 1.0, 3.0)
    assert found.step == 1.0 + 2.0 + 3.0 + (3.0 - 1.0) and found.tokens_per_second == 60 / 8
    assert roofline.optimizer_traffic(10, 20) == 2 * 30 + 2 * 10


def test_all_ways_to_divide_devices():
    dense = meshes.candidate_meshes(tiny_config(), 8)
    assert len(dense) == 10 == len({tuple(mesh.items()) for mesh in dense})
    assert {"data": 2, "fsdp": 2, "tensor": 2} in dense and {"data": 8, "fsdp": 1, "tensor": 1} in dense
    mixture = meshes.candidate_meshes(tiny_config(model_mlp="experts"), 4)
    assert {"data": 1, "fsdp": 1, "tensor": 1, "expert": 4} in mixture


@pytest.mark.slow
def test_search_leaves_out_what_does_not_fit_and_what_cannot_be():
    config = costs.resolve(tiny_config(data_batch_size=8))
    looked = []
    ranked = meshes.search(config, 8, H100, looked.append)
    assert len(looked) == 10
    found = [dict(one.config.mesh) for one in ranked]
    assert all(mesh["tensor"] <= 2 for mesh in found), "the tiny model has 2 heads"
    assert [one.forecast.step for one in ranked] == sorted(one.forecast.step for one in ranked)
    assert all(one.config.train.grad_accumulation == 1 for one in ranked)
    least = min(one.memory.total for one in ranked)
    small = H100._replace(memory=least - 1)
    assert all(one.config.train.grad_accumulation > 1 for one in meshes.search(config, 8, small, looked.append))
    assert meshes.search(config, 8, H100._replace(memory=1000), looked.append) == []


def foreseen(call, *arguments, **changes):
    result = call(plan, f"--config={BASE}", *overrides(**changes), *arguments)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.slow
def test_a_plan_for_a_chip_is_a_table_or_one_object(call):
    (line,) = foreseen(call, "--chip=h100", "--mesh=data=1", "--json").splitlines()
    told = json.loads(line)
    assert told["mesh"] == {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} and told["fits"]
    assert told["flops"] == matmuls.flops_by_scope(alone().jaxpr).total()
    assert told["memory"]["total"] == sum(told["memory"][kind] for kind in compiled_plan.Memory._fields)
    predicted = told["predicted"]
    assert 0 < predicted["mfu"] < 0.6 and predicted["step"] > predicted["products"]
    text = foreseen(call, "--chip=h100")
    assert "fits 80.0 GB" in text and "one device: 1 x NVIDIA H100" in text and "60% of the bf16 peak" in text


@pytest.mark.slow
def test_the_best_meshes_of_a_search_are_compiled(call):
    told = json.loads(foreseen(call, "--chip=v5e", "--search", "--devices=1", "--json"))
    (ranked,), (compiled,) = told["ranked"], told["compiled"]
    assert ranked["mesh"] == compiled["mesh"] and compiled["collectives"] == []
    exact = {kind: size for kind, size in compiled["memory"].items() if kind not in ("temporaries", "total")}
    assert exact.items() <= ranked["memory"].items()


def alone():
    config = costs.resolve(tiny_config())
    built = compiled_plan.build(config, H100)
    return built.step.trace(built.shapes, costs.batch_shapes(config))


@pytest.mark.slow
def test_here_the_forecast_is_compared_with_a_run(call):
    told = json.loads(foreseen(call, "--chip=here", "--measure", "--steps=2", "--json"))
    assert told["error"]["step"] == pytest.approx(told["predicted"]["step"] / told["measured"]["step"] - 1)
    assert told["measured"]["step"] > 0 and told["chip"]["name"] == "here" and told["predicted"]["mfu"] is None


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--mesh=data=8"], "--mesh and --search need --chip, such as --chip=h100"),
        (["--mesh=data=8", "--chip=h1000"], "--chip has no 'h1000'; there are a100, h100, h200"),
        (["--mesh=dta=8", "--chip=h100"], "--mesh has no axis 'dta'; there are data"),
        (["--mesh=data=8,data=2", "--chip=h100"], "it must be like data=8,fsdp=64, each axis once"),
        (["--mesh=data=-1", "--chip=h100"], "it must be like data=8,fsdp=64, each axis once, sizes at least 1"),
        (["--chip=h100", "--measure"], "--measure needs --chip=here"),
        (["--chip=h100", "--search"], "--search needs --devices=N"),
        (["--chip=h100", "--devices=8"], "--search needs --devices=N"),
        (["--chip=h100", "--search", "--devices=0"], "--search needs --devices=N, at least 1"),
        (["--chip=h100", "--search", "--devices=8", "--mesh=data=8"], "and no --mesh"),
    ],
)
def test_refusals(call, flags, expected):
    assert expected in call(plan, f"--config={BASE}", *flags).refusal()
