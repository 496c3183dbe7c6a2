"""Train steps on meshes of chips that are not here, by the chips' own compilers: they compile, attention is cuDNN's and
takes the memory of it, products are in the dtype of the arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AS_USERS_RUN, BASE, ROOT, overrides

pytestmark = pytest.mark.slow
WHEELS = os.environ.get("GPTJAX_CHIP_COMPILERS", "")
if not WHEELS:
    pytest.skip("needs GPTJAX_CHIP_COMPILERS, a folder of the compilers' wheels (.ci/run)", allow_module_level=True)

LAYERS, HEADS, CONTEXT, ROWS = 1, 4, 1024, 32
MODEL = dict(
    model_layers=LAYERS, model_heads=HEADS, model_width=128, model_context=CONTEXT, data_batch_size=ROWS,
    train_dtype="bfloat16",
)  # fmt: skip
EXPERTS = MODEL | dict(model_mlp="experts")
H100 = {
    "one": (1, MODEL, dict(data=1)),
    "data": (8, MODEL, dict(data=8)),
    "fsdp": (8, MODEL, dict(data=1, fsdp=8)),
    "tensor": (8, MODEL, dict(data=4, tensor=2)),
    "context": (8, MODEL, dict(data=2, context=2, tensor=2)),
    "expert": (8, EXPERTS, dict(data=1, expert=8)),
}
V5E = {
    "fsdp": (8, MODEL, dict(data=1, fsdp=8)),
    "tensor": (8, MODEL, dict(data=4, tensor=2)),
    "context": (8, MODEL, dict(data=2, context=4)),
    "expert": (8, EXPERTS, dict(data=1, expert=8)),
}


def compiled(chip, cases):
    """Output of absent_chips.py for each case, by name."""
    wheels = Path(WHEELS)
    said = []
    for count, changes, mesh in cases.values():
        flags = overrides(**changes, **{f"mesh_{axis}": size for axis, size in mesh.items()})
        said.append((chip, count, BASE, flags))
    environment = os.environ | AS_USERS_RUN
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, wheels))),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, wheels.glob("nvidia/*/lib"))),
        "JAX_PLATFORMS": "cpu",  # of what runs, which is nothing
        "TPU_LIBRARY_PATH": str(wheels / "libtpu" / "libtpu.so"),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, "tests/sharding/absent_chips.py", json.dumps(said)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=False))
    assert done.returncode == 0, (list(found), done.stderr[-3000:])
    return found


@pytest.fixture(scope="module")
def h100():
    return compiled("h100", H100)


@pytest.fixture(scope="module")
def v5e():
    return compiled("v5e", V5E)


@pytest.mark.parametrize("name", H100)
def test_on_every_mesh_of_gpus_attention_is_cudnns(h100, name):
    found = h100[name]
    assert found["plan"] == "cuDNN's flash attention"
    assert found["calls"] == {"__cudnn$fmhaSoftmax": LAYERS, "__cudnn$fmhaSoftmaxBackward": LAYERS}


@pytest.mark.parametrize("name", [name for name in H100 if name != "expert"])
def test_no_scores_are_held(h100, name):
    devices, _, _ = H100[name]
    scores = 4 * ROWS * HEADS * CONTEXT**2 / devices
    assert h100[name]["temporaries"] < scores


@pytest.mark.parametrize("name", H100)
def test_products_on_gpus_are_in_bfloat16(h100, name):
    in_float32 = h100[name]["products"].pop("f32 f32", 0)
    assert set(h100[name]["products"]) == {"bf16 bf16"} and sum(h100[name]["products"].values()) > 10
    assert in_float32 == (3 if name == "expert" else 0), "the router's"


def test_gpus_exchange_what_their_mesh_needs(h100):
    assert not h100["one"]["collectives"]
    assert set(h100["data"]["collectives"]) == {"all-reduce"}
    assert {"all-gather", "reduce-scatter"} <= set(h100["fsdp"]["collectives"])
    assert h100["context"]["collectives"]["all-to-all"] >= 4


@pytest.mark.parametrize("name", V5E)
def test_every_mesh_of_tpus_compiles(v5e, name):
    found = v5e[name]
    assert found["plan"] == "plain" and found["products"].get("bf16 bf16", 0) > 5
