"""Parses meshes given by flags and creates them of virtual CPU devices."""

import difflib
import socket

import jax
from ml_collections import ConfigDict

from gptjax.config.errors import ConfigError
from gptjax.planning import chips
from gptjax.planning.chips import Chip
from gptjax.sharding import AXES

ONE_PROCESS = 2048  # with more CPU devices XLA needs a distributed client


def parse_mesh(text: str) -> dict[str, int]:
    """Parses "data=8,fsdp=64" to {"data": 8, "fsdp": 64}.

    Raises:
      ConfigError: invalid syntax or an unknown axis.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            near = difflib.get_close_matches(axis, AXES, n=1)
            raise ConfigError(f"--mesh has no axis {axis!r}; there are {', '.join(near or AXES)}")
        if not size.isdecimal() or int(size) < 1 or axis in mesh:
            raise ConfigError(f"--mesh={text}: it must be like data=8,fsdp=64, each axis once, sizes at least 1")
        mesh[axis] = int(size)
    return mesh


def check_chip(name: str) -> None:
    """Raises ConfigError, with the known chips, for an unknown one."""
    if name not in (*chips.CHIPS, chips.HERE):
        raise ConfigError(f"--chip has no {name!r}; there are {', '.join(chips.CHIPS)}, and {chips.HERE}")


def create(devices: int, chip: str) -> None:
    """Creates virtual devices; call it before JAX initializes its devices.

    Args:
      devices: number of devices.
      chip: "here" keeps JAX's platform; any other chip uses the CPU instead.

    Raises:
      ConfigError: too few devices, and JAX is already initialized.
    """
    try:
        if chip != chips.HERE:
            jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
        if devices > ONE_PROCESS:
            _initialize_distributed()
    except RuntimeError:  # JAX is already initialized, as in a notebook
        pass
    if jax.device_count() < devices:
        raise ConfigError(f"a mesh of {devices} devices; JAX has {jax.device_count()} here")


def _initialize_distributed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)


def get_chip(name: str, config: ConfigDict, devices: int) -> Chip:
    """Returns a chip by name; "here" is measured for the config (gptjax.planning.chips.measure)."""
    return chips.measure(config, devices) if name == chips.HERE else chips.CHIPS[name]
