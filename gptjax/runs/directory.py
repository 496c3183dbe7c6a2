"""The directory of a run: created whole, owned by one config, locked by one process. Independent of the model.

config.json  data.json  tokenizer/  checkpoints/  metrics.jsonl  loss.png  samples.txt  summary.json  profile/
base/ if it started from a Hugging Face model; fisher.safetensors with elastic weight consolidation
clock.json while it is unfinished; hang.txt if it hung; lineage.jsonl of a member of an evolving population
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import schema
from gptjax.core.files import atomic_directory, file_lock, is_new_or_empty, read_json, write_atomic
from gptjax.data import TEXT
from gptjax.data.batches import MixtureStage
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.runs import config as configs

BASE = "base"  # subfolder with the converted Hugging Face model that the run started from
TASK_HEAD = ("task", "labels", "pooling")  # keys of `config.model` for a task head
# Schema of data.json: of a run that trains, and of an imported run that has not been trained.
MIXINGS = [schema.Row(int, {str: int})]
COMMON_FACTS = {"imported?": str, "base?": str, "left_out?": [schema.Row(int, int)]}
DATA_FACTS = ({"fingerprints": {str: str}, "mixings": MIXINGS, **COMMON_FACTS}, {"fingerprints": None, **COMMON_FACTS})
CHAT_TEMPLATE = Path("tokenizer", "chat_template.jinja")  # if the run has one


def is_run(workdir: Path) -> bool:
    """Returns True if the directory has a run."""
    return (workdir / "config.json").is_file()


def check_free(workdir: Path, config: ConfigDict) -> None:
    """Raises ConfigError unless the directory is absent, empty, or a run of the same config."""
    if is_new_or_empty(workdir):
        return
    if not is_run(workdir):
        raise ConfigError(f"{workdir} exists and is not a run; give another --workdir")
    if is_untrained(workdir):
        return
    differing = configs.differences(read_config(workdir), config)
    if differing:
        raise ConfigError(f"{workdir} belongs to another config: {'; '.join(differing)}; give another --workdir")


def is_untrained(workdir: Path) -> bool:
    """Returns True if a run was imported and not trained yet; its first training decides all but the model."""
    return read_data_facts(workdir)["fingerprints"] is None


def origin(config: ConfigDict, workdir: Path) -> Path | None:
    """The run that the model, tokenizer and initial parameters of a run come from, or None.

    An imported run is its own origin; otherwise it is the run that `config.init_from` names.
    """
    if is_run(workdir) and read_data_facts(workdir).get("imported"):
        return workdir
    return base(config, workdir) if config.init_from else None


def base(config: ConfigDict, workdir: Path) -> Path:
    """The run that `config.init_from` names; of a Hugging Face model, its conversion inside `workdir`."""
    return workdir / BASE if configs.is_foreign(config.init_from) else Path(config.init_from).expanduser()


def with_model_of(origin: Path, config: ConfigDict, free: Sequence[str]) -> ConfigDict:
    """Returns the config with the model and tokenizer of the run at `origin`.

    Args:
      origin: directory of a run.
      config: not resolved.
      free: keys of `config.model` that are not replaced; those of a task head only if the config has a task.

    Raises:
      CheckpointError: there is no run at `origin`.
    """
    origin_config = read_config(origin)
    config = config.copy_and_resolve_references()
    has_task = config.model.task != "none"
    with config.unlocked():
        overrides = {key: config.model[key] for key in free if has_task or key not in TASK_HEAD}
        config.model = ConfigDict(origin_config.model.to_dict() | overrides)
        config.data.tokenizer = origin_config.data.tokenizer
    return config.lock()


def create(
    workdir: Path,
    config: ConfigDict,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    fill: Callable[[Path], None] = lambda unfinished: None,
) -> None:
    """Creates a run directory, completely or not at all.

    Args:
      workdir: absent or empty.
      config: resolved.
      tokenizer: of the run.
      facts: about its data.
      fill: adds other initial files to the directory it is passed.
    """
    with atomic_directory(workdir) as unfinished:
        tokenizers.save(tokenizer, unfinished / "tokenizer")
        (unfinished / "data.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (unfinished / "config.json").write_text(configs.to_json(config), encoding="utf-8")
        fill(unfinished)


def begin_training(workdir: Path, config: ConfigDict, facts: dict[str, Any]) -> None:
    """Writes the config and the data facts of a run whose training starts or continues with another mixture.

    The run is an imported one that is trained for the first time, or one that resumes with another data.mixture.
    """
    old = read_data_facts(workdir)
    facts = old | facts | {"fingerprints": (old["fingerprints"] or {}) | facts["fingerprints"]}
    # In this order: until the second is written the run counts as untrained, and this can be repeated.
    write_atomic(workdir / "config.json", configs.to_json(config))
    write_data_facts(workdir, facts)


def left_out(workdir: Path) -> list[tuple[int, int]]:
    """Reads the (first, last) steps of each range whose batches the run leaves out."""
    return [(first, last) for first, last in read_data_facts(workdir).get("left_out", [])]


def leave_out(workdir: Path, first: int, last: int) -> None:
    """Adds a range of steps whose batches the run leaves out, now and when it resumes."""
    write_data_facts(workdir, read_data_facts(workdir) | {"left_out": [*left_out(workdir), (first, last)]})


def copy_original_tokenizer(source: Path, target: Path) -> None:
    """Copies the original files of an imported tokenizer and the chat template, if any, from run to run."""
    if (source / "tokenizer" / "hf").is_dir():
        shutil.copytree(source / "tokenizer" / "hf", target / "tokenizer" / "hf")
    if (source / CHAT_TEMPLATE).exists():
        shutil.copyfile(source / CHAT_TEMPLATE, target / CHAT_TEMPLATE)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Prevents other processes from training in the directory while the block runs.

    Raises:
      ConfigError: another process trains in it.
    """
    with file_lock(workdir / "config.json") as acquired:
        if not acquired:
            raise ConfigError(f"another process is training in {workdir}")
        yield


def read_config(workdir: Path) -> ConfigDict:
    """Reads the resolved config of a run.

    Raises:
      CheckpointError: there is no run, or its config cannot be read.
    """
    path = workdir / "config.json"
    if not is_run(workdir):
        raise CheckpointError(f"{workdir} is not a run: it has no config.json")
    try:
        return configs.from_json(json.dumps(read_json(path)))
    except DataError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_data_facts(workdir: Path) -> dict[str, Any]:
    """Reads the facts about the data of a run, from data.json.

    Raises:
      CheckpointError: the file cannot be read, or is damaged.
    """
    try:
        return schema.read(workdir / "data.json", DATA_FACTS)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def write_data_facts(workdir: Path, facts: dict[str, Any]) -> None:
    """Replaces the facts about the data of a run."""
    write_atomic(workdir / "data.json", json.dumps(facts, indent=2) + "\n")


def check_has_text(workdir: Path) -> None:
    """Raises DataError for a run that was imported and has no text."""
    if is_untrained(workdir):
        raise DataError(f"{workdir} was imported and has no held-out text; give --data and files of text")


def check_same_text(workdir: Path, fingerprints: dict[str, str]) -> None:
    """Raises DataError if a text of the run has changed since it was first read; new texts are allowed."""
    recorded = read_data_facts(workdir)["fingerprints"]
    for name, fingerprint in fingerprints.items():
        if recorded.get(name, fingerprint) != fingerprint:
            source = "the text" if name == TEXT else f"the set {name}"
            raise DataError(f"{source} that {workdir} was trained on has changed since; give the original text")


def mixings(workdir: Path) -> list[MixtureStage]:
    """Reads the mixtures of data sets that the run has used, with the step at which each starts."""
    return [MixtureStage(start, shares) for start, shares in read_data_facts(workdir)["mixings"]]
