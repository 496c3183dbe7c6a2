"""A run is a directory: how it begins, is claimed by one config and one process, and is read. Knows no model.

config.json  data.json  tokenizer/  checkpoints/  metrics.jsonl  loss.png  samples.txt  summary.json  profile/
base/ where it began with a Hugging Face model; fisher.safetensors where it is to remember a text
clock.json while it is unfinished; hang.txt where it hung; lineage.jsonl of a member of a population that evolves
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import schema
from gptjax.core.files import atomic_directory, file_lock, is_new_or_empty, read_json, write_atomic
from gptjax.data import TEXT
from gptjax.data.batches import MixtureStage
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

BASE = "base"  # in a run that began with a Hugging Face model: that, as a run
TASK_HEAD = ("task", "labels", "pooling")  # keys of `config.model` about a task head
# Shape of data.json: of a run that trains, and of one that was imported and has not been trained.
MIXINGS = [schema.Row(int, {str: int})]
ALWAYS = {"imported?": str, "base?": str, "left_out?": [schema.Row(int, int)]}
DATA_FACTS = ({"fingerprints": {str: str}, "mixings": MIXINGS, **ALWAYS}, {"fingerprints": None, **ALWAYS})
CHAT_TEMPLATE = Path("tokenizer", "chat_template.jinja")  # in a run that has one


def is_run(workdir: Path) -> bool:
    """Whether a run has begun in the directory."""
    return (workdir / "config.json").is_file()


def check_free(workdir: Path, config: ConfigDict) -> None:
    """Raises ConfigError unless the directory is absent, empty, or this config's own run."""
    if is_new_or_empty(workdir):
        return
    if not is_run(workdir):
        raise ConfigError(f"{workdir} exists and is no run; give another --workdir")
    if is_untrained(workdir):
        return
    differing = configs.differences(read_config(workdir), config)
    if differing:
        raise ConfigError(f"{workdir} belongs to another config: {'; '.join(differing)}; give another --workdir")


def is_untrained(workdir: Path) -> bool:
    """Whether a run was imported and has not been trained since: its first training decides all but the model."""
    return read_data_facts(workdir)["fingerprints"] is None


def origin(config: ConfigDict, workdir: Path) -> Path | None:
    """The run that gives another its model, tokenizer and first parameters, if there is one.

    That is an imported run itself, or the one that `config.init_from` names, which of a Hugging Face model is there
    once the run is.
    """
    if is_run(workdir) and read_data_facts(workdir).get("imported"):
        return workdir
    return base(config, workdir) if config.init_from else None


def base(config: ConfigDict, workdir: Path) -> Path:
    """The run that `config.init_from` names, for a run in `workdir`."""
    return workdir / BASE if configs.is_foreign(config.init_from) else Path(config.init_from).expanduser()


def with_model_of(origin: Path, config: ConfigDict, free: Sequence[str]) -> ConfigDict:
    """The config with the model and tokenizer of the run at `origin`.

    Args:
      origin: a run's directory.
      config: not yet resolved.
      free: keys of `config.model` that stay as they are; those of a task head where it asks for one.

    Raises:
      CheckpointError: there is no run.
    """
    theirs = read_config(origin)
    config = config.copy_and_resolve_references()
    asked = config.model.task != "none"
    with config.unlocked():
        own = {key: config.model[key] for key in free if asked or key not in TASK_HEAD}
        config.model = ConfigDict(theirs.model.to_dict() | own)
        config.data.tokenizer = theirs.data.tokenizer
    return config.lock()


def create(
    workdir: Path,
    config: ConfigDict,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    fill: Callable[[Path], None] = lambda unfinished: None,
) -> None:
    """Makes a run directory, whole or not at all.

    Args:
      workdir: absent or empty.
      config: resolved.
      tokenizer: the run's.
      facts: about its data.
      fill: puts in what else the run begins with.
    """
    with atomic_directory(workdir) as unfinished:
        tokenizers.save(tokenizer, unfinished / "tokenizer")
        (unfinished / "data.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (unfinished / "config.json").write_text(configs.to_json(config), encoding="utf-8")
        fill(unfinished)


def begin_training(workdir: Path, config: ConfigDict, facts: dict[str, Any]) -> None:
    """Gives a run the config and the facts about its data that its training has from now on.

    That is an imported run whose training begins, or one that goes on with another mixture.
    """
    known = read_data_facts(workdir)
    facts = known | facts | {"fingerprints": (known["fingerprints"] or {}) | facts["fingerprints"]}
    # In this order: until the second is there the run counts as untrained, and this can be done again.
    write_atomic(workdir / "config.json", configs.to_json(config))
    write_data_facts(workdir, facts)


def left_out(workdir: Path) -> list[tuple[int, int]]:
    """The first and the last step of each stretch whose batches the run does not train on."""
    return [(first, last) for first, last in read_data_facts(workdir).get("left_out", [])]


def leave_out(workdir: Path, first: int, last: int) -> None:
    """Has the run leave out the batches of these steps, now and whenever it goes on."""
    write_data_facts(workdir, read_data_facts(workdir) | {"left_out": [*left_out(workdir), (first, last)]})


def keep_original_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files as they came with an import, and the chat template, from run to run, if any."""
    if (source / "tokenizer" / "hf").is_dir():
        shutil.copytree(source / "tokenizer" / "hf", target / "tokenizer" / "hf")
    if (source / CHAT_TEMPLATE).exists():
        shutil.copyfile(source / CHAT_TEMPLATE, target / CHAT_TEMPLATE)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in the directory while the block runs.

    Raises:
      ConfigError: another process has it.
    """
    with file_lock(workdir / "config.json") as ours:
        if not ours:
            raise ConfigError(f"another process is training in {workdir}")
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
        return configs.from_json(json.dumps(read_json(path)))
    except DataError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_data_facts(workdir: Path) -> dict[str, Any]:
    """What `create` was told about the run's data.

    Raises:
      CheckpointError: it cannot be read, or is damaged.
    """
    try:
        return schema.read(workdir / "data.json", DATA_FACTS)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def write_data_facts(workdir: Path, facts: dict[str, Any]) -> None:
    """Puts them in the place of those that there are."""
    write_atomic(workdir / "data.json", json.dumps(facts, indent=2) + "\n")


def check_has_text(workdir: Path) -> None:
    """Raises DataError for a run that was imported and has no text of its own."""
    if is_untrained(workdir):
        raise DataError(f"{workdir} was imported and has no held-out text; give --data and files of text")


def check_same_text(workdir: Path, fingerprints: dict[str, str]) -> None:
    """Raises DataError where a text of the run has changed since it was first read; new ones are none of its."""
    known = read_data_facts(workdir)["fingerprints"]
    for name, fingerprint in fingerprints.items():
        if known.get(name, fingerprint) != fingerprint:
            what = "the text" if name == TEXT else f"the set {name}"
            raise DataError(f"{what} that {workdir} was trained on has changed since; its results would not be its own")


def mixings(workdir: Path) -> list[MixtureStage]:
    """In what proportions the run has read its sets so far, and will read them."""
    return [MixtureStage(start, shares) for start, shares in read_data_facts(workdir)["mixings"]]
