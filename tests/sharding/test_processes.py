"""Runs of several processes: detection, and exact resume after they are stopped or killed."""

import gzip
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time

import jax
import jsonschema
import numpy as np
import pytest
import yaml
from conftest import BASE, ROOT, overrides

import gptjax
from gptjax.config.errors import ConfigError
from gptjax.runs.checkpoints import Checkpoints
from gptjax.sharding.processes import ProcessInfo, detect

NOBODY = ProcessInfo()
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        (NOBODY, {}, None),
        (ProcessInfo("a:1", 2, 1), {}, ProcessInfo("a:1", 2, 1)),
        (NOBODY, BY_HAND, ProcessInfo("a:1", 4, 3)),
        (ProcessInfo("b:2", 2, 0), BY_HAND, ProcessInfo("b:2", 2, 0)),
        (NOBODY, BY_HAND | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (NOBODY, {"SLURM_STEP_NUM_TASKS": "16"}, NOBODY),
        (NOBODY, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"}, None),
        (NOBODY, {"OMPI_COMM_WORLD_SIZE": "2"}, NOBODY),
        (NOBODY, {"TPU_WORKER_HOSTNAMES": "a,b"}, NOBODY),
        (NOBODY, {"TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_processes_are_detected(flags, environment, expected):
    assert detect(flags, environment) == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        (ProcessInfo("a:1"), "go together"),
        (ProcessInfo(None, 2, 0), "go together"),
        (ProcessInfo("a:1", 2, 2), "--process=2"),
    ],
)
def test_incomplete_process_info_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        detect(flags, {})


def test_jobset_manifest_matches_its_schema_and_the_command():
    manifest = yaml.safe_load((ROOT / "experiments/launch/jobset.yaml").read_text())
    schema = json.loads(gzip.decompress((ROOT / "tests/golden/jobset.schema.json.gz").read_bytes()))
    jsonschema.validate(manifest, schema)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    values = {variable["name"]: variable.get("value", "0") for variable in container["env"]}
    assert detect(NOBODY, values) == ProcessInfo("gptjax-host-0-0.gptjax:1234", job["completions"], 0)
    assert job["parallelism"] == job["completions"]
    container["portz"] = []
    with pytest.raises(jsonschema.ValidationError, match="portz"):
        jsonschema.validate(manifest, schema)


def test_slurm_script_is_valid_bash_and_keeps_exit_codes():
    script = ROOT / "experiments/launch/slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.search(r"^0 \| 2 \| 3\) exit", script.read_text(), re.M)


# With real processes.


def launcher():
    spec = importlib.util.spec_from_file_location("localhost", ROOT / "experiments/launch/localhost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(text_file, workdir, processes, *more):
    """Processes of the same run, 8 devices in all, with stderr in files."""
    flags = overrides(
        data_path=text_file, data_batch_size=8, model_width=32, train_steps=30, eval_every_steps=15, log_every_steps=1,
        checkpoint_every_steps=10, sample_max_tokens=1,
    )  # fmt: skip
    command = [sys.executable, "-m", "gptjax.train", f"--config={BASE}", f"--workdir={workdir}", *flags]
    command += ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--heartbeat=10", *more]
    return launcher().start(
        command, processes, 8 // processes, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def ended(running):
    """[(exit code, stderr)] of processes, after all have exited."""
    said = [process.communicate(timeout=300)[1] for process in running]
    return list(zip([process.returncode for process in running], said, strict=True))


def finish(running):
    for code, said in ended(running):
        assert code == 0, said


def reach(workdir, step, running):
    while not any(line["step"] >= step for line in lines_of(workdir)):
        assert all(process.poll() is None for process in running), ended(running)
        time.sleep(0.05)


def lines_of(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def same(a, b):
    assert [line["train/loss"] for line in lines_of(a)] == [line["train/loss"] for line in lines_of(b)]
    jax.tree.map(np.testing.assert_array_equal, gptjax.load(a).params, gptjax.load(b).params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_file):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finish(run_of(text_file, workdir, 2))
    return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_does(whole, text_file, tmp_path):
    [(code, said)] = ended(run_of(text_file, tmp_path / "alone", 1)[:1])
    assert code == 0, said
    both, alone = ([line["train/loss"] for line in lines_of(run)] for run in (whole, tmp_path / "alone"))
    assert len(both) == 30
    np.testing.assert_allclose(both, alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_either_saves_the_same_step_on_both(which, whole, text_file, tmp_path):
    running = run_of(text_file, tmp_path / "run", 2)
    reach(tmp_path / "run", 12, running)
    running[which].send_signal(signal.SIGTERM)
    results = ended(running)
    assert [code for code, _ in results] == [143, 143], results
    steps = {re.search(r"saved at step (\d+)", said)[1] for _, said in results}
    assert steps == {str(Checkpoints(tmp_path / "run").latest())}
    finish(run_of(text_file, tmp_path / "run", 2))
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_sigkill_of_one_ends_the_other_and_both_resume_exactly(whole, text_file, tmp_path):
    running = run_of(text_file, tmp_path / "run", 2)
    reach(tmp_path / "run", 14, running)
    running[1].kill()
    started = time.monotonic()
    results = ended(running)
    assert time.monotonic() - started < 60 and results[0][0] not in (0, 2, 3), results
    finish(run_of(text_file, tmp_path / "run", 2))
    same(tmp_path / "run", whole)


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(whole, text_file, tmp_path):
    running = run_of(text_file, tmp_path / "run", 2)
    reach(tmp_path / "run", 12, running)
    running[0].send_signal(signal.SIGTERM)
    assert [code for code, _ in ended(running)] == [143, 143]
    [(code, said)] = ended(run_of(text_file, tmp_path / "run", 1, "--config.mesh.fsdp=1", "--config.mesh.data=1"))
    assert code == 0 and "resuming" in said, said
    both, one = ([line["train/loss"] for line in lines_of(run)] for run in (whole, tmp_path / "run"))
    np.testing.assert_allclose(one, both, rtol=1e-5)
