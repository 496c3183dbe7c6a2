"""Keeps the CPUs of a virtual machine from idling between the operations of a step.

XLA's CPU threads wait for each other hundreds of times per step, mostly for less time than it takes to sleep and wake.
An idle virtual CPU is returned to the host, which may be slow to schedule it again. For the duration of a block, a
spinning thread of the lowest priority therefore keeps each CPU busy; any other thread preempts it at once. (PyTorch's
OpenMP threads spin themselves.)

GPTJAX_WAKEFUL=0    lets CPUs idle
GPTJAX_WAKEFUL=1    keeps them busy on any Linux machine, not only on virtual ones without a CPU quota
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_enabled() -> bool:
    """Returns True on a Linux virtual machine without a CPU quota, unless GPTJAX_WAKEFUL says otherwise."""
    setting = os.environ.get("GPTJAX_WAKEFUL")
    if setting == "0" or sys.platform != "linux":
        return False
    return setting == "1" or (_is_virtual() and not _has_quota())


def _is_virtual() -> bool:
    try:
        return " hypervisor" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _has_quota() -> bool:
    files = (("cpu.max", "max"), ("cpu/cpu.cfs_quota_us", "-1"))
    for name, unlimited in files:
        try:
            if not (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").startswith(unlimited):
                return True
        except OSError:
            continue
    return False


@contextmanager
def keep_awake(enabled: bool = True) -> Iterator[None]:
    """Keeps the CPUs of this process busy during the block if `is_enabled()`.

    Args:
      enabled: False does nothing, for work on accelerators.
    """
    if not (enabled and is_enabled()):
        yield
        return
    # In C, without the GIL: waiting for a locked spin lock uses the pause instruction.
    c = ctypes.CDLL(None)
    lock = ctypes.c_int()
    c.pthread_spin_init(ctypes.byref(lock), 0)
    c.pthread_spin_lock(ctypes.byref(lock))

    def spin(cpu: int) -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # this thread only, as the next
            os.sched_setaffinity(0, {cpu})
        except OSError:
            return
        c.pthread_spin_lock(ctypes.byref(lock))
        c.pthread_spin_unlock(ctypes.byref(lock))

    threads = [threading.Thread(target=spin, args=(n,), daemon=True) for n in sorted(os.sched_getaffinity(0))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        c.pthread_spin_unlock(ctypes.byref(lock))
        for thread in threads:
            thread.join()
