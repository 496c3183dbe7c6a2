"""Adapters: the parameters that fine-tuning trained, as a small folder with adapter.json and adapter.safetensors.

An adapter has the options of the method, the tuned arrays, and the fingerprint of its base, but nothing of the base.
Several adapters can use one base at once and share its arrays.
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

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import files
from gptjax.core.files import atomic_directory, is_new_or_empty
from gptjax.finetune import methods, paths, prompts, quantization
from gptjax.finetune.paths import Flat
from gptjax.models.stacking import stack, unstack
from gptjax.runs import config as configs
from gptjax.runs import directory as workdirs
from gptjax.runs import pretrained

if TYPE_CHECKING:
    from gptjax.runs.run import Run

FACTS, TENSORS = "adapter.json", "adapter.safetensors"
# Keys of `config.finetune` that the model needs, for adapters from other libraries.
DEFAULTS: dict[str, Any] = dict(rank_stabilised=False, dropout=0.0, parallel=False, quantise="none")


def save(run: "Run", folder: Path) -> dict[str, Any]:
    """Writes the adapter of a run; returns its method, number of parameters and base.

    Raises:
      ConfigError: the folder exists, or the run tuned all of its parameters.
    """
    if not is_new_or_empty(folder):
        raise ConfigError(f"{folder} exists; give another folder")
    if not pretrained.is_partial(run.config):
        raise ConfigError(f"{run.workdir} tuned all parameters of its model; it has no adapter")
    base = paths.flat(pretrained.base_params(workdirs.base(run.config, run.workdir), run.config))
    frozen = paths.flat(quantization.quantize_dequantize(paths.nested(base), run.config.finetune.quantise))
    tuned = {path: leaf for path, leaf in paths.flat(run.params).items() if not is_identical(leaf, frozen.get(path))}
    facts = {
        "base": pretrained.fingerprint(paths.nested(base)),
        "init_from": run.config.init_from,
        "finetune": run.config.finetune.to_dict(),
        "model": run.config.model.to_dict(),
    }
    with atomic_directory(folder) as unfinished:
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        save_file({path: np.asarray(leaf, order="C") for path, leaf in tuned.items()}, unfinished / TENSORS)
    count = sum(leaf.size for leaf in tuned.values())
    return {"method": run.config.finetune.method, "parameters": count, "base": run.config.init_from}


def is_identical(leaf: Any, other: Any) -> bool:
    """Returns True if two arrays are bitwise identical."""
    return other is not None and leaf.shape == other.shape and bool(np.array_equal(leaf, other))


def load(base: "Run", folder: str | Path) -> "Run":
    """Loads an adapter onto its base; both runs can be used, and share the arrays that were not tuned.

    Raises:
      DataError: the folder has no adapter, or a damaged one.
      ConfigError: the adapter has another base, or the library that quantizes the base is not installed.
    """
    facts, tuned = read(Path(folder))
    fingerprint = pretrained.fingerprint(base.params)
    if facts["base"] != fingerprint:
        raise ConfigError(
            f"{folder} was tuned on other parameters than {base.workdir} has (on {facts['init_from']}, fingerprint "
            f"{facts['base'][:12]}, not {fingerprint[:12]})"
        )
    try:
        adapted = attach_adapter(base, tuned, facts["finetune"], facts["model"])
        model: Any = adapted.model
        jax.eval_shape(lambda params: model.apply({"params": params}, **models.dummy_inputs(model)), adapted.params)
    except (KeyError, TypeError, ValueError, AttributeError, FlaxError) as error:  # the facts do not fit the arrays
        why = str(error).strip().splitlines()[0][:200]
        raise DataError(f"the adapter {folder} is damaged, or belongs to another model than it says: {why}") from error
    return adapted


def attach_adapter(base: "Run", tuned: Flat, finetune: dict[str, Any], model: dict[str, Any] | None = None) -> "Run":
    """Attaches tuned arrays to a base.

    Args:
      base: the run; it does not change.
      tuned: arrays by path.
      finetune: `config.finetune`.
      model: `config.model`, if it differs from the base's, as with a task head.
    """
    config = ConfigDict(base.config.to_dict())
    config.model, config.finetune = ConfigDict(model or config.model), ConfigDict(finetune)
    config.init_from = str(base.workdir.absolute())
    config = configs.from_json(configs.to_json(config))
    laid_out = stack(base.params) if config.model.scan_layers else unstack(base.params)
    frozen = paths.nested({path: leaf for path, leaf in paths.flat(laid_out).items() if path not in tuned})
    params = paths.union(quantization.quantize_dequantize(frozen, config.finetune.quantise), paths.nested(tuned))
    linen, tokenizer = methods.build_model(config), prompts.with_prompt(base.tokenizer, config)
    return dataclasses.replace(base, config=config, model=linen, params=params, tokenizer=tokenizer)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the facts and the arrays, by path, of an adapter.

    Raises:
      DataError: the folder has no adapter, or a damaged one.
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
