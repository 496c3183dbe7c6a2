"""Runs of several processes: initialization, work of the first process alone, and synchronization.

Each host runs the same command; JAX's multi-controller runtime does the rest. A run's directory has to be on a file
system that all processes share, and only the first process writes to it (except for checkpoints, of which each writes
its shards). With a single process these functions cost nothing.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.config.errors import ConfigError
from gptjax.core import console

T = TypeVar("T")

HEARTBEAT_SECONDS = 60  # timeout after which a silent process counts as dead, and the others exit

# Environment variables with the number of a job's processes; JAX detects the coordinator in these environments.
DETECTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class ProcessInfo(NamedTuple):
    """Index of this process, the number of processes and their coordinator; None: detected by JAX."""

    coordinator: str | None = None  # host:port of the first process
    processes: int | None = None
    process: int | None = None


def detect(flags: ProcessInfo, environment: Mapping[str, str]) -> ProcessInfo | None:
    """Returns this process's info; None if it is the only one.

    Args:
      flags: from the command line; fields that are None are looked up in the environment.
      environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (as experiments/launch/jobset.yaml sets
        them), or the variables of SLURM, Open MPI or a TPU pod.

    Raises:
      ConfigError: only some of the fields are given.
    """
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    coordinator = flags.coordinator or environment.get(names[0])
    numbers = [
        int(environment[name]) if number is None and environment.get(name, "").isdigit() else number
        for number, name in zip((flags.processes, flags.process), names[1:], strict=True)
    ]
    if coordinator and None not in numbers:
        processes, process = numbers
        if not 0 <= process < processes:  # type: ignore[operator]
            raise ConfigError(f"--process={process} must be 0 or more and less than --processes={processes}")
        return ProcessInfo(coordinator, processes, process) if processes != 1 else None
    detected = any(int(environment.get(name, "1") or 1) > 1 for name in DETECTED)
    detected = detected or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if detected:
        return ProcessInfo(coordinator, *numbers)
    if coordinator or numbers != [None, None]:
        raise ConfigError(
            "--coordinator, --processes and --process go together; or start the command by srun or mpirun, or set "
            f"{', '.join(names)}"
        )
    return None


def start(flags: ProcessInfo, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes, if there are any. Call it before JAX initializes its devices.

    Args:
      flags: from the command line.
      heartbeat: seconds of silence after which a process counts as dead.

    Raises:
      ConfigError: see `detect`; or the other processes cannot be reached.
    """
    info = detect(flags, os.environ)
    if info is None:
        return
    try:
        jax.distributed.initialize(*info, heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the other processes cannot be joined: {str(error).splitlines()[0][:200]}") from error
    console.set_enabled(jax.process_index() == 0)
    console.say(f"processes  {jax.process_count()}, of {jax.local_device_count()} devices each")


def is_first() -> bool:
    """Returns True in the one process that writes to the run's directory."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast(find: Callable[[], int]) -> int:
    """Computes a number in the first process and returns it in all."""
    if jax.process_count() == 1:
        return find()
    return int(multihost_utils.broadcast_one_to_all(np.int64(find() if is_first() else 0)))


def run_on_first(do: Callable[[], T], name: str) -> T | None:
    """Runs a function in the first process while the others wait; returns its result there, and None in the others."""
    result = do() if is_first() else None
    sync(name)
    return result


def gather(params: Any) -> Any:
    """Gathers parameters that are sharded over several processes into full numpy arrays in each process."""
    return params if jax.process_count() == 1 else multihost_utils.process_allgather(params, tiled=True)
