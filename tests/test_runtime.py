"""The process's set-up: the allocator seam and the cache, and that a user's own win."""

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
    script = f"{before}from gptjax import runtime; print(runtime.keep_freed_memory())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    if expected == "True" and done.stdout.strip() == "False":
        pytest.skip("this C library has no mallopt that takes these options")
    assert done.stdout.strip() == expected


def test_a_users_own_cache_wins(tmp_path):
    script = "from gptjax import runtime; runtime.start(); import jax; print(jax.config.jax_compilation_cache_dir)"
    for variables, expected in (
        ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}, str(tmp_path)),
        ({"XDG_CACHE_HOME": str(tmp_path)}, f"{tmp_path}/gptjax/xla"),
    ):
        environment = {name: value for name, value in os.environ.items() if "CACHE" not in name} | variables
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
