"""Resolves `config.init_from`: a Hugging Face model is converted once, next to the run directory."""

import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from gptjax.config import is_foreign
from gptjax.config.errors import ConfigError
from gptjax.interop import convert_run
from gptjax.runs import directory as workdirs
from gptjax.sharding import processes


@contextmanager
def resolve_pretrained(config: ConfigDict, workdir: Path) -> Iterator[Path | None]:
    """Yields the run that the run in `workdir` is initialized from, or None.

    A Hugging Face model is converted once, next to the directory, and moved into it when that is created
    (gptjax.runs.directory); if it has not been moved by the end of the block, it is deleted.

    Raises:
      ConfigError, DataError: the directory is not empty, or the model cannot be converted.
    """
    if not is_foreign(config.init_from) or workdirs.is_run(workdir):
        yield workdirs.origin(config, workdir)
        return
    workdirs.check_free(workdir, config)
    number = processes.broadcast(lambda: secrets.randbelow(2**31))
    folder = workdir.parent / f".{workdir.name}.{workdirs.BASE}-{number}"
    try:
        processes.run_on_first(lambda: convert(config.init_from, folder), "the model is converted")
        yield folder
    finally:
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)


def convert(init_from: str, folder: Path) -> None:
    """Converts hf:FOLDER, or hf:NAME on the hub, to a run; raises the errors of convert_run.import_run."""
    try:
        convert_run.import_run(init_from.removeprefix("hf:"), folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, in python -m gptjax.convert --from={shlex.quote(init_from)} --to=RUN") from error
