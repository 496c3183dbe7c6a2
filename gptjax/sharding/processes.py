"""Several processes as one run: how they find each other, what only the first one does, what they agree on.

Each host runs the same command; JAX's multi-controller runtime does the rest. A run's directory has to be on a file
system that all of them see, and only the first process writes to it (but for checkpoints, of which each writes its
part). With one process everything here is free and does nothing.
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

HEARTBEAT_SECONDS = 60  # after which a process that is silent counts as dead, and the others end

# Where an environment tells how many processes a job has; JAX finds the coordinator in each of these by itself.
DETECTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class Place(NamedTuple):
    """Which process of how many this is, and who coordinates them; None: JAX finds out."""

    coordinator: str | None = None  # host:port of the first process
    processes: int | None = None
    process: int | None = None


def place(flags: Place, environment: Mapping[str, str]) -> Place | None:
    """The place of this process among several; None where it is alone.

    Args:
      flags: as given on the command line; what is None there may be in the environment.
      environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (as experiments/launch/jobset.yaml sets
        them), or SLURM's or Open MPI's, or that of a pod of TPUs.

    Raises:
      ConfigError: some of it is given and the rest is not.
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
        return Place(coordinator, processes, process) if processes != 1 else None
    detected = any(int(environment.get(name, "1") or 1) > 1 for name in DETECTED)
    detected = detected or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if detected:
        return Place(coordinator, *numbers)
    if coordinator or numbers != [None, None]:
        raise ConfigError(
            "--coordinator, --processes and --process go together; or start the command by srun or mpirun, or set "
            f"{', '.join(names)}"
        )
    return None


def start(flags: Place, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes, where there are any; before anything asks JAX for devices.

    Args:
      flags: of the command line.
      heartbeat: seconds of silence after which a process counts as dead.

    Raises:
      ConfigError: as `place`, or the others cannot be reached.
    """
    found = place(flags, os.environ)
    if found is None:
        return
    try:
        jax.distributed.initialize(*found, heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the other processes cannot be joined: {str(error).splitlines()[0][:200]}") from error
    console.set_enabled(jax.process_index() == 0)
    console.say(f"processes  {jax.process_count()}, of {jax.local_device_count()} devices each")


def is_first() -> bool:
    """Whether this is the one process that writes to the run's directory."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first(find: Callable[[], int]) -> int:
    """A number that the first process finds and all get."""
    if jax.process_count() == 1:
        return find()
    return int(multihost_utils.broadcast_one_to_all(np.int64(find() if is_first() else 0)))


def first_does(do: Callable[[], T], name: str) -> T | None:
    """Lets the first process do something and the others wait for it; what it gave, None for the others."""
    done = do() if is_first() else None
    meet(name)
    return done


def by_all(params: Any) -> Any:
    """Parameters as numpy arrays that each process has whole, where they lie on several processes' devices."""
    return params if jax.process_count() == 1 else multihost_utils.process_allgather(params, tiled=True)
