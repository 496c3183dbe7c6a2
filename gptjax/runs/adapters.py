"""What fine-tuning made, as a small folder of its own: adapter.json and adapter.safetensors.

It has the method's settings, what was tuned, and the fingerprint of the base that it belongs to, and nothing of the
base. Several can be held on one base at once, and share its arrays.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.errors import FlaxError
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gptjax import config as configs
from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import files
from gptjax.core.files import atomic_directory, is_new_or_empty
from gptjax.finetune import methods, paths, prompts, quantised
from gptjax.finetune.paths import Flat
from gptjax.models.stacking import stack, unstack
from gptjax.runs import directory as workdirs
from gptjax.runs import pretrained

if TYPE_CHECKING:
    from gptjax.runs.run import Run

FACTS, TENSORS = "adapter.json", "adapter.safetensors"
# What the model's additions need to know of `config.finetune`, for adapters that came from elsewhere.
PLAIN: dict[str, Any] = dict(rank_stabilised=False, dropout=0.0, parallel=False, quantise="none")


def save(of: "Run", folder: Path) -> dict[str, Any]:
    """Writes what a run tuned; returns its method, how many parameters it has, and its base.

    Raises:
      ConfigError: the folder is taken, or the run has tuned all that it has.
    """
    if not is_new_or_empty(folder):
        raise ConfigError(f"{folder} exists; give another folder")
    if not pretrained.is_part(of.config):
        raise ConfigError(f"{of.workdir} has tuned all of its model: there is no adapter apart from it")
    base = paths.flat(pretrained.base_params(workdirs.base(of.config, of.workdir), of.config))
    kept = paths.flat(quantised.as_kept(paths.nested(base), of.config.finetune.quantise))
    tuned = {path: leaf for path, leaf in paths.flat(of.params).items() if not is_same(leaf, kept.get(path))}
    facts = {
        "base": pretrained.fingerprint(paths.nested(base)),
        "init_from": of.config.init_from,
        "finetune": of.config.finetune.to_dict(),
        "model": of.config.model.to_dict(),
    }
    with atomic_directory(folder) as unfinished:
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        save_file({path: np.asarray(leaf, order="C") for path, leaf in tuned.items()}, unfinished / TENSORS)
    count = sum(leaf.size for leaf in tuned.values())
    return {"method": of.config.finetune.method, "parameters": count, "base": of.config.init_from}


def is_same(leaf: Any, other: Any) -> bool:
    """Whether an array is the other one, to the bit."""
    return other is not None and leaf.shape == other.shape and bool(np.array_equal(leaf, other))


def load(base: "Run", folder: str | Path) -> "Run":
    """The base with what was tuned on it; both can be used, and share what was not tuned.

    Raises:
      DataError: no adapter, or one that is damaged.
      ConfigError: it belongs to another base, or its base was quantised, and what does that is not installed.
    """
    facts, tuned = read(Path(folder))
    own = pretrained.fingerprint(base.params)
    if facts["base"] != own:
        raise ConfigError(
            f"{folder} was tuned on other parameters than {base.workdir} has (on {facts['init_from']}, fingerprint "
            f"{facts['base'][:12]}, not {own[:12]})"
        )
    try:
        adapted = beside(base, tuned, facts["finetune"], facts["model"])
        model: Any = adapted.model
        jax.eval_shape(lambda params: model.apply({"params": params}, **models.example(model)), adapted.params)
    except (KeyError, TypeError, ValueError, AttributeError, FlaxError) as error:  # of a model made of what it says
        why = str(error).strip().splitlines()[0][:200]
        raise DataError(f"the adapter {folder} is damaged, or of another model than it says: {why}") from error
    return adapted


def beside(base: "Run", tuned: Flat, finetune: dict[str, Any], model: dict[str, Any] | None = None) -> "Run":
    """The base with what was tuned on it.

    Args:
      base: of which nothing changes.
      tuned: arrays by path.
      finetune: `config.finetune`.
      model: `config.model`, where it is not the base's, as with a task head.
    """
    config = ConfigDict(base.config.to_dict())
    config.model, config.finetune = ConfigDict(model or config.model), ConfigDict(finetune)
    config.init_from = str(base.workdir.absolute())
    config = configs.from_json(configs.to_json(config))
    laid_out = stack(base.params) if config.model.scan_layers else unstack(base.params)
    frozen = paths.nested({path: leaf for path, leaf in paths.flat(laid_out).items() if path not in tuned})
    params = paths.union(quantised.as_kept(frozen, config.finetune.quantise), paths.nested(tuned))
    linen, tokenizer = methods.model_of(config), prompts.seen(base.tokenizer, config)
    return dataclasses.replace(base, config=config, model=linen, params=params, tokenizer=tokenizer)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What an adapter's folder holds: facts, and arrays by path.

    Raises:
      DataError: no adapter, or one that is damaged.
    """
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} is no adapter: it has no {FACTS}")
    facts = files.read_json(folder / FACTS)
    for key, kind in {"base": str, "init_from": str, "finetune": dict, "model": dict}.items():
        if not isinstance(facts.get(key), kind):
            raise DataError(f"{folder / FACTS} is damaged: {key} is {str(facts.get(key))[:40]}, no {kind.__name__}")
    try:
        return facts, load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {str(error).splitlines()[0][:200]}") from error
