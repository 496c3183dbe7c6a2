"""Memory that this process can use on its devices."""

import resource
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.config.errors import ConfigError

KIB = 1024


class DeviceMemory(NamedTuple):
    """Memory of a device.

    Attributes:
      bytes: size.
      owner: description of the device, for messages.
    """

    bytes: int
    owner: str


def device_memory() -> DeviceMemory | None:
    """Returns the memory of each device of this process; None if unknown."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        available = process_memory()
        return None if available is None else DeviceMemory(available // len(devices), "this machine")
    limits = [limit for device in devices if (limit := (device.memory_stats() or {}).get("bytes_limit"))]
    return DeviceMemory(min(limits), f"a {devices[0].device_kind}") if limits else None


def check_cache(cache: Any, rows: int, capacity: int) -> None:
    """Raises ConfigError if the key/value cache, given by its shapes, does not fit in a device's memory."""
    memory, need = device_memory(), tree_bytes(cache)
    if memory is not None and need > memory.bytes:
        raise ConfigError(
            f"the key/value cache of {rows:,} texts of {capacity:,} tokens needs {gib(need)}, and {memory.owner} has "
            f"{gib(memory.bytes)}; reduce --batch_size, --max_length or --max_tokens"
        )


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gib(amount: float) -> str:
    """Formats bytes as GiB."""
    size = amount / 2**30
    return f"{size:,.1f} GiB" if size < 1e6 else f"{size:.1g} GiB"


def process_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the bytes that this process can use: its own and free memory, within its limits; None if unknown.

    Args:
      proc: Linux's /proc.
      cgroup: Linux's cgroup file system, version 1 or 2.
    """
    free, resident = _kib(proc / "meminfo", "MemAvailable"), _kib(proc / "self" / "status", "VmRSS")
    limits = [] if free is None else [free + (resident or 0)]
    limits += _group_limits(proc / "self" / "cgroup", cgroup)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits += [] if address_space == resource.RLIM_INFINITY else [address_space]
    return min(limits, default=None)


def _kib(path: Path, name: str) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(lines[name].split()[0]) * KIB
    except (OSError, KeyError, ValueError):
        return None


def _group_limits(groups: Path, root: Path) -> list[int]:
    """Returns the limits of a process's cgroup and its parents; a container may show its own as the root."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    limits = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((place / name).read_text(encoding="utf-8")))
            if place == top:
                break
    return limits
