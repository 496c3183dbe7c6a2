"""Meshes: the same losses on all of them, sharded memory, and the expected collectives of each."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from gptjax import sharding
from gptjax.planning import compiled_plan

FEW = ("one", "data", "fsdp", "tensor", "tensor alone", "context", "experts, one", "experts, expert")
FEW += ("recurrent, one", "recurrent, fsdp", "cudnn, one", "cudnn, all")
MORE = (
    "hybrid", "experts, data", "experts, all", "llama, one", "llama, fsdp", "llama, all", "bfloat16, one",
    "bfloat16, all", "bfloat16 experts, one", "bfloat16 experts, all", "cudnn, tensor", "cudnn, context",
)  # fmt: skip


def trained(names):
    command = [sys.executable, "tests/sharding/eight_devices.py", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def runs():
    return trained(FEW)


@pytest.fixture(scope="module")
def more(runs):
    return runs | trained(MORE)


def names(run):
    return {name for name, _, _ in run["collectives"]}


def of_more_than_scalars(run, name):
    """[[shape, path], ...] of the results of one kind of collective that are not scalars."""
    return [
        (shape, where)
        for found, shapes, where in run["collectives"]
        if found == name
        for shape in shapes
        if math.prod(shape) > 1
    ]


def check_losses(runs, family):
    of_family = [name for name in runs if name.startswith(family) and (family or "," not in name)]
    alone = runs[f"{family}one"]["losses"]
    assert alone[-1] < alone[0] and len(alone) == 20 and len(of_family) > 1
    for name in of_family:
        np.testing.assert_allclose(runs[name]["losses"], alone, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["", "experts, ", "recurrent, ", "cudnn, "])
def test_every_mesh_gives_the_same_losses(runs, family):
    check_losses(runs, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["", "experts, ", "llama, ", "cudnn, "])
def test_meshes_of_several_axes_give_the_same_losses(more, family):
    check_losses(more, family)


@pytest.mark.slow
def test_losses_in_bfloat16_are_close(more):
    for family in ("bfloat16", "bfloat16 experts"):
        np.testing.assert_allclose(more[f"{family}, all"]["losses"], more[f"{family}, one"]["losses"], rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts",
    [("fsdp", {"kernel": 8, "embedding": 8, "scale": 8}), ("tensor", {"kernel": 8, "scale": 4}), ("data", {"": 1})],
)
def test_sharded_arrays_take_their_share_of_memory(runs, name, parts):
    """Parameters and optimizer state; each device holds an equal share."""
    found = set()
    for path, (whole, *held) in runs[name]["held"].items():
        for kind, share in parts.items():
            if kind in path and whole > 4:
                assert held == [whole // share], path
                found.add("params" if path.startswith(".params") else "optimizer")
    assert found == {"params", "optimizer"}


@pytest.mark.slow
def test_only_experts_are_sharded_over_the_expert_axis(runs):
    for path, (whole, *held) in runs["experts, expert"]["held"].items():
        assert held == [whole // (4 if "['mlp']" in path and "router" not in path else 1)], path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", "context", "experts, expert"])
def test_shardings_of_the_state_do_not_change(runs, name):
    assert runs[name]["stays"]


@pytest.mark.slow
def test_data_parallel_only_reduces(runs):
    assert names(runs["data"]) == {"all-reduce"}
    assert names(runs["one"]) == set()


@pytest.mark.slow
def test_data_parallel_with_experts_only_reduces(more):
    assert names(more["experts, data"]) == {"all-reduce"}


@pytest.mark.slow
def test_fsdp_gathers_each_parameter_once_where_it_is_used_and_scatters_its_gradient(runs):
    run = runs["fsdp"]
    assert names(run) == {"all-gather", "reduce-scatter", "all-reduce"}
    params = [path for path in run["held"] if path.startswith(".params")]
    gathered, scattered = of_more_than_scalars(run, "all-gather"), of_more_than_scalars(run, "reduce-scatter")
    assert len(gathered) == len(scattered) == len(params)
    assert not of_more_than_scalars(run, "all-reduce"), "gradients are not added up whole"
    for path in params:
        modules = re.findall(r"\['(\w+)'\]", path)[:-1]
        within = [where for _, where in gathered if set(modules) <= set(re.split(r"[/.]", where))]
        assert len(within) == 1, f"{path}: within the module that it belongs to"


@pytest.mark.slow
def test_scanned_layers_are_gathered_one_at_a_time(more):
    run = more["llama, fsdp"]
    stacked = {tuple([2, *shape]) for shape, where in of_more_than_scalars(run, "all-gather") if "/blocks/" in where}
    assert len(stacked) >= 4
    assert not stacked & {tuple(shape) for shape, _ in of_more_than_scalars(run, "all-gather")}
    weights = [where for shape, where in of_more_than_scalars(run, "reduce-scatter") if "/blocks/" in where]
    assert len(weights) == 7, "five matrices and two norms of the one compiled block"


@pytest.mark.slow
def test_tensor_parallel_reduces_activations_and_gathers_as_fsdp(runs):
    run = runs["tensor"]
    params = [path for path in run["held"] if path.startswith(".params")]
    assert (
        len(of_more_than_scalars(run, "all-gather")) == len(of_more_than_scalars(run, "reduce-scatter")) == len(params)
    )
    of_width = [where for shape, where in of_more_than_scalars(run, "all-reduce") if shape == [4, 16, 32]]
    forward = [where for where in of_width if "transpose(" not in where and "block_" in where]
    backward = [where for where in of_width if "transpose(" in where and "block_" in where]
    assert len(forward) == len(backward) == 4, "one after attention and one after the MLP of each layer, both ways"
    assert "all-to-all" not in names(run) and "collective-permute" not in names(run)


@pytest.mark.slow
def test_context_parallel_gathers_keys_and_values_and_no_parameter(runs):
    gathered = of_more_than_scalars(runs["context"], "all-gather")
    # By shape, since the operation that a gather is named after differs between versions of JAX.
    keys_and_values = [shape for shape, where in gathered if "/attention/" in where and len(shape) == 4]
    assert keys_and_values == [[8, 16, 4, 8]] * 4
    assert not any("kernel" in where or "mlp" in where for _, where in gathered)


@pytest.mark.slow
def test_experts_exchange_tokens_and_not_parameters(runs):
    run = runs["experts, expert"]
    assert names(run) == {"all-gather", "reduce-scatter", "all-reduce"}
    for shape, where in [*of_more_than_scalars(run, "all-gather"), *of_more_than_scalars(run, "reduce-scatter")]:
        assert "mlp" in where and shape[1] == 16 and shape[0] in (2, 8), (shape, where)


def test_batch_shardings_follow_the_letters_of_names():
    mesh, rows = compiled_plan.abstract_mesh({"data": 2, "context": 4}), ("data", "fsdp", "expert")
    shapes = {
        "inputs_BT": (8, 16), "source_BS": (8, 16), "labels_B": (8,), "spans_B2": (8, 2), "choices_BT": (8, 4, 16),
        "teacher_BTV": (8, 16, 7),
    }  # fmt: skip
    found = sharding.batch_shardings(mesh, {name: np.zeros(shape) for name, shape in shapes.items()})
    assert {name: tuple(there.spec) for name, there in found.items()} == {
        "inputs_BT": (rows, "context"), "source_BS": (rows, "context"), "labels_B": (rows,),
        "spans_B2": (rows, None), "choices_BT": (rows, None, "context"), "teacher_BTV": (rows, "context", "tensor"),
    }  # fmt: skip
    slices = sharding.batch_shardings(mesh, {"labels_B": np.zeros((2, 8))}, leading=1)
    assert tuple(slices["labels_B"].spec) == (None, rows)
