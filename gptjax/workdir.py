"""A run is a directory: how it begins, is claimed by one config and one process, and is read. Knows no model.

config.json  data.json  tokenizer/  checkpoints/  metrics.jsonl  loss.png  samples.txt  summary.json
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiktoken
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax.config import CheckpointError, ConfigError, DataError
from gptjax.data import tokenizers


def is_run(workdir: Path) -> bool:
    """Whether a run has begun in the directory."""
    return (workdir / "config.json").is_file()


def check_free(workdir: Path, config: ConfigDict) -> None:
    """Raises ConfigError unless the directory is absent, empty, or this config's own run."""
    if not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())):
        return
    if not is_run(workdir):
        raise ConfigError(f"{workdir} exists and is no run; give another --workdir")
    differing = configs.differences(read_config(workdir), config)
    if differing:
        raise ConfigError(f"{workdir} belongs to another config: {'; '.join(differing)}; give another --workdir")


def create(workdir: Path, config: ConfigDict, tokenizer: tiktoken.Encoding, facts: dict[str, Any]) -> None:
    """Makes a run directory, whole or not at all, with its config, tokenizer and facts about its data."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=workdir.parent, prefix=f".{workdir.name}."))
    try:
        os.chmod(unfinished, 0o755)
        tokenizers.save(tokenizer, unfinished / "tokenizer")
        (unfinished / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
        (unfinished / "config.json").write_text(configs.to_json(config))
        os.rename(unfinished, workdir)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in the directory while the block runs.

    Raises:
      ConfigError: another process has it.
    """
    with open(workdir / "config.json", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is training in {workdir}") from error
        yield


def read_config(workdir: Path) -> ConfigDict:
    """The resolved config of a run.

    Raises:
      CheckpointError: there is no run, or its config cannot be read.
    """
    path = workdir / "config.json"
    if not is_run(workdir):
        raise CheckpointError(f"{workdir} is no run: it has no config.json")
    try:
        return configs.from_json(path.read_text())
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_data_facts(workdir: Path) -> dict[str, Any]:
    """What `create` was told about the run's data."""
    try:
        return json.loads((workdir / "data.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{workdir / 'data.json'} cannot be read: {error}") from error


def check_same_text(workdir: Path, fingerprint: str) -> None:
    """Raises DataError where the run's text has changed since it began."""
    if read_data_facts(workdir)["fingerprint"] != fingerprint:
        raise DataError(f"the text that {workdir} was trained on has changed since; its results would not be its own")
