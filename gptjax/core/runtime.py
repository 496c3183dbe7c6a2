"""Set-up of the process, once, before jax is imported: the compilation cache and the allocator. No logic of models.

GPTJAX_MALLOC=0              leaves the C allocator as it is: slower steps, less memory
JAX_COMPILATION_CACHE_DIR    where compiled programs are kept; default ~/.cache/gptjax/xla
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path


def cache_dir() -> Path:
    """Where gptjax keeps what can be made again: ~/.cache/gptjax, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptjax"


def start() -> None:
    """Prepares the process; every command calls it first."""
    keep_freed_memory()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def processors_as_devices() -> None:
    """Lets jax have a CPU device for each processor, so that work of several devices takes place side by side.

    Operations of small models keep one processor busy, not several. Does nothing where somebody has said how many
    there are to be, or once jax has begun. Without effect on GPUs and TPUs.
    """
    import jax

    by_flag = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    said = by_flag or "JAX_NUM_CPU_DEVICES" in os.environ
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not said:
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", there)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation instead of returning it to the kernel.

    XLA's CPU backend allocates its temporary buffers afresh at every step; fresh pages cost more than many steps'
    arithmetic. Does nothing, and returns False, without glibc, once jax is imported, or with GPTJAX_MALLOC=0.
    """
    if os.environ.get("GPTJAX_MALLOC") == "0" or sys.platform != "linux" or "jaxlib" in sys.modules:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    # One arena, because the others give back whatever fills 64 MB, as the buffers of all but small models do. The price
    # is memory: glibc's aligned allocations cannot use a hole of just their size, so several copies of a buffer remain.
    options = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
