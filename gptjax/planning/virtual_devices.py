"""Meshes of devices that are not here: as flags say them, and as virtual devices of this process's CPU."""

import difflib
import socket

import jax
from ml_collections import ConfigDict

from gptjax.config.errors import ConfigError
from gptjax.planning import chips
from gptjax.planning.chips import Chip
from gptjax.sharding import AXES

ONE_PROCESS = 2048  # XLA's CPU devices from this number on are another process's, and want a way to talk to it


def mesh(text: str) -> dict[str, int]:
    """{"data": 8, "fsdp": 64} from "data=8,fsdp=64".

    Raises:
      ConfigError: it is no such list, or names an axis that there is not.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=1)
            raise ConfigError(f"--mesh has no axis {axis!r}; there are {', '.join(near or AXES)}")
        if not size.isdecimal() or int(size) < 1 or axis in found:
            raise ConfigError(f"--mesh={text}: it must be like data=8,fsdp=64, each axis once, sizes at least 1")
        found[axis] = int(size)
    return found


def check_chip(name: str) -> None:
    """Raises ConfigError for a chip that is not known, with those that are."""
    if name not in (*chips.CHIPS, chips.HERE):
        raise ConfigError(f"--chip has no {name!r}; there are {', '.join(chips.CHIPS)}, and {chips.HERE}")


def start(devices: int, chip: str) -> None:
    """Makes so many devices. Call it before anything asks JAX for its devices.

    Args:
      devices: how many.
      chip: "here" keeps the platform that JAX finds; for any other the CPU stands in.

    Raises:
      ConfigError: there are too few, and it is too late to make more.
    """
    try:
        if chip != chips.HERE:
            jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        if devices > ONE_PROCESS:
            _talk_to_itself()
    except RuntimeError:  # JAX has its devices already, as in a notebook
        pass
    if jax.device_count() < devices:
        raise ConfigError(f"a mesh of {devices} devices; JAX has {jax.device_count()} here")


def _talk_to_itself() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)


def chip(name: str, config: ConfigDict, devices: int) -> Chip:
    """The chip of that name; "here" is measured for a config, see gptjax.planning.chips.here."""
    return chips.here(config, devices) if name == chips.HERE else chips.CHIPS[name]
