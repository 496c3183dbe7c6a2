"""Memory of this machine: what a process can have of it, for its devices."""

import resource
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax.config.errors import ConfigError

KIB = 1024


class Room(NamedTuple):
    """Memory for what lies on devices.

    Attributes:
      bytes: of one device.
      whose: in words.
    """

    bytes: int
    whose: str


def room() -> Room | None:
    """Memory of each of this process's devices; None where the system does not say."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        found = of_process()
        return None if found is None else Room(found // len(devices), "this machine")
    limits = [limit for device in devices if (limit := (device.memory_stats() or {}).get("bytes_limit"))]
    return Room(min(limits), f"a {devices[0].device_kind}") if limits else None


def check_cache(cache: Any, rows: int, capacity: int) -> None:
    """Raises ConfigError for keys and values, given by their shapes, for which a device has not enough memory."""
    found, need = room(), bytes_of(cache)
    if found is not None and need > found.bytes:
        raise ConfigError(
            f"keys and values of {rows:,} texts of {capacity:,} tokens need {gib(need)}, and {found.whose} has "
            f"{gib(found.bytes)}; make --batch_size, --max_length or --max_tokens smaller"
        )


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gib(amount: float) -> str:
    """An amount of bytes for a message."""
    found = amount / 2**30
    return f"{found:,.1f} GiB" if found < 1e6 else f"{found:.1g} GiB"


def of_process(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can have: what it has, with what is free, within the limits that hold for it.

    Args:
      proc: where Linux tells of processes.
      cgroup: where it tells of their groups, version 1 or 2.
    """
    free, own = _kib(proc / "meminfo", "MemAvailable"), _kib(proc / "self" / "status", "VmRSS")
    found = [] if free is None else [free + (own or 0)]
    found += _group_limits(proc / "self" / "cgroup", cgroup)
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    found += [] if allowed == resource.RLIM_INFINITY else [allowed]
    return min(found, default=None)


def _kib(path: Path, name: str) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(lines[name].split()[0]) * KIB
    except (OSError, KeyError, ValueError):
        return None


def _group_limits(groups: Path, root: Path) -> list[int]:
    """Limits of the group that a process is in and of those around it; a container may show its own as the root."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # not there, or "max"
                found.append(int((place / name).read_text(encoding="utf-8")))
            if place == top:
                break
    return found
