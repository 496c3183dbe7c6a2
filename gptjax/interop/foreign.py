"""Models of other libraries that a run begins with: each is converted once, beside the run's directory."""

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
    """The run that another, in `workdir`, begins with or has begun with, if there is one.

    A Hugging Face model is converted once, beside the directory, and goes into that when it is made
    (gptjax.runs.directory); what has not gone there when the block ends is deleted.

    Raises:
      ConfigError, DataError: the directory is taken, or the model cannot be converted.
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
    """Makes a run of hf:FOLDER, or of hf:NAME on the hub; errors as of gptjax.interop.convert_run.import_run."""
    try:
        convert_run.import_run(init_from.removeprefix("hf:"), folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, in python -m gptjax.convert --from={shlex.quote(init_from)} --to=RUN") from error
