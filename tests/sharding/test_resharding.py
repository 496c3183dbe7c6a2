"""A run resumes on other devices than it began on: the same batches, the same losses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, overrides

# Meshes that one run is trained on, one after the other.
MESHES = ({"data": 8}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 1}, {"data": 2, "context": 2}, {"fsdp": 8})
EACH = 3

SCRIPT = """
import json, sys
from pathlib import Path
from gptjax.runs import config as configs
from gptjax.training import loop

flags, meshes, workdir, each = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
save = loop.Checkpoints.save

def save_and_stop(self, step, *arguments):
    save(self, step, *arguments)
    if len(meshes) > 1 and step < each * len(meshes):
        raise KeyboardInterrupt

loop.Checkpoints.save = save_and_stop
for mesh in meshes:
    sizes = {"data": 1} | mesh
    config = configs.read("configs/base.py", flags + [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()])
    try:
        loop.train(config, workdir)
    except KeyboardInterrupt as stopped:
        print(stopped)
"""


def losses(workdir):
    return [json.loads(line)["train/loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train(workdir, text_file, meshes):
    steps = EACH * len(MESHES)
    flags = overrides(
        data_path=text_file, data_batch_size=8, model_heads=4, model_width=32, train_steps=steps,
        eval_every_steps=steps, checkpoint_every_steps=EACH, log_every_steps=1,
        optimizer_learning_rate=1e-3,
    )  # fmt: skip
    each = str(steps // len(meshes))
    command = [sys.executable, "-c", SCRIPT, json.dumps(flags), json.dumps(meshes), str(workdir), each]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_a_run_resumes_on_any_mesh(tmp_path, text_file):
    done = train(tmp_path / "many", text_file, MESHES)
    for step in range(EACH, EACH * len(MESHES), EACH):
        assert f"saved at step {step}" in done.stdout
    for devices in (8, 4, 1):
        assert f" on {devices} cpu device" in done.stderr
    train(tmp_path / "one", text_file, MESHES[3:4])
    alone = losses(tmp_path / "one")
    assert len(alone) == EACH * len(MESHES) and alone[-1] < alone[0]
    np.testing.assert_allclose(losses(tmp_path / "many"), alone, rtol=1e-5)
