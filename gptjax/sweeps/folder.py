"""The directory of a sweep: sweep.json identifies it, trials/ has its runs, outcomes/ their results.

sweep.json  trials/  outcomes/  results.csv  seeds.csv  plots/  best.py  summary.json  (study.journal  claims/)
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import schema
from gptjax.core.files import atomic_directory, file_lock, is_new_or_empty
from gptjax.runs import config as configs
from gptjax.runs import directory as workdirs
from gptjax.sweeps.trials import Search, search_signature

SWEEP_FILE = "sweep.json"


def identity(search: Search) -> dict[str, Any]:
    """Returns the facts that identify a sweep when its command is repeated: the resolved config and the search."""
    return {"config": configs.resolve(search.config()).to_dict(), "search": search_signature(search)}


def open_or_create(folder: Path, search: Search) -> dict[str, Any]:
    """Creates the directory of a sweep, or checks that it belongs to this sweep; returns the content of sweep.json.

    Raises:
      ConfigError: the directory has a run, another sweep or anything else.
    """
    if workdirs.is_run(folder):
        raise ConfigError(f"{folder} is a run, not a sweep; give another --workdir")
    if is_new_or_empty(folder):
        create(folder, search)
    if not (folder / SWEEP_FILE).is_file():
        raise ConfigError(f"{folder} exists and is not a sweep; give another --workdir")
    try:
        content = schema.read(folder / SWEEP_FILE, {"config": {}, "search": {str: str}, "home": str})
        check_same(content, search, str(folder))
    except (DataError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / SWEEP_FILE} is damaged: {error}") from error
    return content


def create(folder: Path, search: Search) -> None:
    """Creates the directory of a sweep, unless another process of the same sweep has just created it."""
    content = identity(search) | {"home": secrets.token_hex(8)}
    try:
        with atomic_directory(folder) as unfinished:
            (unfinished / SWEEP_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError:
        if not (folder / SWEEP_FILE).is_file():
            raise


def check_same(content: dict[str, Any], search: Search, where: str) -> None:
    """Raises ConfigError if an existing sweep has another config or searches something else."""
    expected = identity(search)
    config = configs.from_json(json.dumps(content["config"]))
    differing = configs.differences(config, configs.from_json(json.dumps(expected["config"])))
    for key in sorted(content["search"].keys() | expected["search"].keys()):
        old, new = content["search"].get(key, "absent"), expected["search"].get(key, "absent")
        differing += [f"{key} ({old} there, {new} here)"] if old != new else []
    if differing:
        raise ConfigError(f"{where} belongs to another sweep: {'; '.join(differing)}; give another --workdir")


@contextmanager
def lock_sweep(folder: Path) -> Iterator[None]:
    """Prevents other processes from sweeping in the directory while the block runs.

    Raises:
      ConfigError: another process sweeps in it.
    """
    with file_lock(folder / SWEEP_FILE) as acquired:
        if not acquired:
            raise ConfigError(f"another process is sweeping in {folder}; with --optuna=N several share one study")
        yield
