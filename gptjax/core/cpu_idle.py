"""Keeps a virtual machine's processors from sleeping between two operations of a step. No logic of models.

XLA's threads on CPU wait for each other hundreds of times a step, mostly for less than it takes to sleep and wake. A
processor of a virtual machine that sleeps is given back to the host, which may have other use for it and be slow to
return it. So for the length of a block a thread of the lowest priority waits actively on each processor: anything
else that wants to run there runs at once (PyTorch's OpenMP threads wait actively themselves).

GPTJAX_WAKEFUL=0    lets processors sleep
GPTJAX_WAKEFUL=1    keeps them awake on any Linux machine, not only on virtual ones without a limit of processor time
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_wanted() -> bool:
    """Whether it pays here: on Linux in a virtual machine, and where waiting is not charged to a group's limit."""
    chosen = os.environ.get("GPTJAX_WAKEFUL")
    if chosen == "0" or sys.platform != "linux":
        return False
    return chosen == "1" or (_is_virtual() and not _has_limit())


def _is_virtual() -> bool:
    try:
        return " hypervisor" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _has_limit() -> bool:
    files = (("cpu.max", "max"), ("cpu/cpu.cfs_quota_us", "-1"))
    for name, unlimited in files:
        try:
            if not (Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8").startswith(unlimited):
                return True
        except OSError:
            continue
    return False


@contextmanager
def wakeful(wanted: bool = True) -> Iterator[None]:
    """No processor that this process may run on sleeps during the block, where `is_wanted`.

    Args:
      wanted: False does nothing: for work that is not the processors'.
    """
    if not (wanted and is_wanted()):
        yield
        return
    # In C, where no lock of Python's is held: a spin lock that is taken is waited for with the pause instruction.
    c = ctypes.CDLL(None)
    lock = ctypes.c_int()
    c.pthread_spin_init(ctypes.byref(lock), 0)
    c.pthread_spin_lock(ctypes.byref(lock))

    def wait(processor: int) -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread alone, as the next
            os.sched_setaffinity(0, {processor})
        except OSError:
            return
        c.pthread_spin_lock(ctypes.byref(lock))
        c.pthread_spin_unlock(ctypes.byref(lock))

    threads = [threading.Thread(target=wait, args=(n,), daemon=True) for n in sorted(os.sched_getaffinity(0))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        c.pthread_spin_unlock(ctypes.byref(lock))
        for thread in threads:
            thread.join()
