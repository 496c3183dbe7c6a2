"""A sweep's directory: sweep.json says whose it is, trials/ has runs, outcomes/ what became of each. Trains nothing.

sweep.json  trials/  outcomes/  results.csv  seeds.csv  plots/  best.py  summary.json  (study.journal  claims/)
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptjax import config as configs
from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import schema
from gptjax.core.files import atomic_directory, file_lock, is_new_or_empty
from gptjax.runs import directory as workdirs
from gptjax.sweeps.trials import Search, shape_of

OWN = "sweep.json"


def identity(search: Search) -> dict[str, Any]:
    """What makes a sweep the same sweep when its command is given again: its config, resolved, and its way."""
    return {"config": configs.resolve(search.config()).to_dict(), "search": shape_of(search)}


def begin(folder: Path, search: Search) -> dict[str, Any]:
    """Makes a sweep's directory, or finds that it is this sweep's; returns what sweep.json says.

    Raises:
      ConfigError: the directory is a run's, another sweep's or anything else's.
    """
    if workdirs.is_run(folder):
        raise ConfigError(f"{folder} is a run, and no sweep; give another --workdir")
    if is_new_or_empty(folder):
        make(folder, search)
    if not (folder / OWN).is_file():
        raise ConfigError(f"{folder} exists and is no sweep; give another --workdir")
    try:
        own = schema.read(folder / OWN, {"config": {}, "search": {str: str}, "home": str})
        check_same(own, search, str(folder))
    except (DataError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / OWN} is damaged: {error}") from error
    return own


def make(folder: Path, search: Search) -> None:
    """Makes a sweep's directory, unless another process of the same sweep has just made it."""
    own = identity(search) | {"home": secrets.token_hex(8)}
    try:
        with atomic_directory(folder) as unfinished:
            (unfinished / OWN).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    except OSError:
        if not (folder / OWN).is_file():
            raise


def check_same(own: dict[str, Any], search: Search, where: str) -> None:
    """Raises ConfigError where a sweep that has begun has another config or looks through something else."""
    ours = identity(search)
    there = configs.from_json(json.dumps(own["config"]))
    differing = configs.differences(there, configs.from_json(json.dumps(ours["config"])))
    for key in sorted(own["search"].keys() | ours["search"].keys()):
        old, new = own["search"].get(key, "absent"), ours["search"].get(key, "absent")
        differing += [f"{key} ({old} there, {new} here)"] if old != new else []
    if differing:
        raise ConfigError(f"{where} belongs to another sweep: {'; '.join(differing)}; give another --workdir")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from sweeping in the directory while the block runs.

    Raises:
      ConfigError: another process has it.
    """
    with file_lock(folder / OWN) as ours:
        if not ours:
            raise ConfigError(f"another process is sweeping in {folder}; with --optuna=N several share one study")
        yield
