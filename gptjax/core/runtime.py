"""Sets up the process before jax is imported: the compilation cache and the memory allocator.

GPTJAX_MALLOC=0              does not tune the C allocator: slower steps, less memory
JAX_COMPILATION_CACHE_DIR    directory of compiled programs; default ~/.cache/gptjax/xla
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


def cache_dir() -> Path:
    """Returns the cache directory: ~/.cache/gptjax, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptjax"


def start() -> None:
    """Sets up the process; every command calls it first."""
    keep_freed_memory()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def processors_as_devices() -> None:
    """Gives jax a CPU device per processor, so that independent work runs in parallel.

    Operations of small models use only one processor. Does nothing if the number of devices is already configured or
    jax is initialized, and has no effect on GPUs and TPUs.
    """
    import jax

    by_flag = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    configured = by_flag or "JAX_NUM_CPU_DEVICES" in os.environ
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not configured:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for later allocations instead of returning it to the kernel.

    XLA's CPU backend allocates its temporary buffers in every step, and page faults can cost more than the arithmetic.
    Does nothing and returns False without glibc, once jax is imported, or with GPTJAX_MALLOC=0.
    """
    if os.environ.get("GPTJAX_MALLOC") == "0" or sys.platform != "linux" or "jaxlib" in sys.modules:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    # One arena, since the others return blocks of 64 MB, as are the buffers of all but small models. The price is
    # memory: aligned allocations of glibc cannot reuse a hole of exactly their size, so copies of a buffer remain.
    options = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
