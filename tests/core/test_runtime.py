"""Set-up of the process: the allocator and the cache; the user's own settings take precedence."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="the seam is for glibc")
@pytest.mark.parametrize(
    "before, variables, expected",
    [("", {}, "True"), ("", {"GPTJAX_MALLOC": "0"}, "False"), ("import jax; ", {}, "False")],
)
def test_freed_memory_is_kept_unless_turned_off_or_too_late(before, variables, expected):
    script = f"{before}from gptjax.core import runtime; print(runtime.keep_freed_memory())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    if expected == "True" and done.stdout.strip() == "False":
        pytest.skip("this C library has no mallopt that takes these options")
    assert done.stdout.strip() == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the seam is for glibc")
def test_the_memory_of_one_call_is_the_next_ones():
    """81 MB of temporary buffers are 19,775 pages, which would be faulted and cleared at each call.

    Any one call may still take new ones, as it depends on which thread frees first: so it is of the median call.
    """
    script = """
from gptjax.core import runtime; print(runtime.keep_freed_memory())
import jax, jax.numpy as jnp, resource
x = jnp.ones((4500, 4500))
f = jax.jit(lambda x: (jax.lax.optimization_barrier(x.T + 1) * x).sum())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sorted(faults() for _ in range(60))[30])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt that takes these options")
    assert int(faults) < 1_000


@pytest.mark.slow
def test_a_users_own_cache_wins(tmp_path):
    script = "from gptjax.core import runtime; runtime.start(); import jax; print(jax.config.jax_compilation_cache_dir)"
    for variables, expected in (
        ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}, str(tmp_path)),
        ({"XDG_CACHE_HOME": str(tmp_path)}, f"{tmp_path}/gptjax/xla"),
    ):
        environment = {name: value for name, value in os.environ.items() if "CACHE" not in name} | variables
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.thorough
@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_each_processor_is_a_device_unless_somebody_has_said_how_many(variables, expected):
    script = "from gptjax.core import runtime; runtime.processors_as_devices(); import jax; print(jax.device_count())"
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= variables | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == expected


def test_devices_are_left_as_they_are_once_jax_has_begun():
    script = """
import jax
jax.numpy.ones(1)
from gptjax.core import runtime
runtime.processors_as_devices()
print(jax.device_count())
"""
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1
