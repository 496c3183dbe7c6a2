"""Imports and exports LoRA and DoRA adapters in peft's format: Hugging Face's module names, safetensors, no pickles."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import hub
from gptjax.core.files import atomic_directory, is_new_or_empty
from gptjax.finetune import methods, paths
from gptjax.finetune.paths import Flat
from gptjax.interop import families, peft_config, weights
from gptjax.interop.convert_run import match_family
from gptjax.interop.peft_config import LoraConfig
from gptjax.interop.weight_mapping import Tensor, from_hf, to_hf
from gptjax.models.stacking import unstack
from gptjax.runs import adapters

if TYPE_CHECKING:
    from gptjax.runs.run import Run

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
NAME = re.compile(rf"{re.escape(PREFIX)}(.+)\.({re.escape(LORA_A)}|{re.escape(LORA_B)}|{MAGNITUDE})")
METHODS = ("lora", "dora")


def kernels(run: "Run") -> dict[str, Tensor]:
    """Returns the kernel of each module by the module's path.

    Raises:
      ConfigError: no Hugging Face family computes the same as the model.
    """
    family, _, model, _ = match_family(run.config.model.to_dict() | {"objective": run.config.train.objective})
    tensors = [tensor for tensor in families.tensors_of(family, model) if tensor.name.endswith("/kernel")]
    return {tensor.name.removesuffix("/kernel"): tensor for tensor in tensors}


def module_name(name: str) -> str:
    """Returns the Hugging Face module of a weight."""
    return name.removesuffix(".weight")


def save(run: "Run", folder: Path) -> dict[str, Any]:
    """Writes a run's LoRA or DoRA adapter to a folder that `peft.PeftModel.from_pretrained` loads on its base.

    Raises:
      ConfigError: another fine-tuning method, a folder that is not empty, or a model that no Hugging Face family has.
    """
    options = run.config.finetune
    if options.method not in METHODS:
        raise ConfigError(f"peft: writes LoRA and DoRA adapters only; {run.workdir} was tuned by {options.method}")
    if not is_new_or_empty(folder):
        raise ConfigError(f"{folder} exists; give another folder")
    leaves, modules = paths.flat(unstack(run.params)), kernels(run)
    arrays: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}  # of modules whose rank differs from the run's
    for name in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        tensor = modules[name]._replace(transposed=True)
        a_DR, b_RF = (np.asarray(leaves[f"{name}/{key}"]) for key in ("lora_a", "lora_b"))
        for hf_name, b_FR in zip(tensor.hf_names, to_hf(tensor, b_RF), strict=True):
            arrays[f"{PREFIX}{module_name(hf_name)}.lora_A.weight"] = a_DR.T
            arrays[f"{PREFIX}{module_name(hf_name)}.lora_B.weight"] = b_FR
            if b_FR.shape[1] != options.rank:
                ranks[module_name(hf_name)] = b_FR.shape[1]
        if options.method == "dora":
            length_F = np.linalg.norm(leaves[f"{name}/kernel"], axis=0) + np.asarray(leaves[f"{name}/dora"])
            for hf_name, length in zip(tensor.hf_names, to_hf(tensor, length_F), strict=True):
                arrays[f"{PREFIX}{module_name(hf_name)}.lora_magnitude_vector"] = length
    factor = partial(peft_config.scale, alpha=1.0, rank_stabilised=options.rank_stabilised)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if run.config.model.arch == "gpt" else None,
        "base_model_name_or_path": run.config.init_from.removeprefix("hf:"),
        "r": options.rank,
        "lora_alpha": options.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {name: options.alpha * factor(options.rank) / factor(R) for name, R in ranks.items()},
        "lora_dropout": options.dropout,
        "use_rslora": options.rank_stabilised,
        "use_dora": options.method == "dora",
        "target_modules": sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in arrays}),
        "fan_in_fan_out": any(not tensor.transposed for tensor in modules.values()),
        "bias": "none",
    }
    with atomic_directory(folder) as unfinished:
        (unfinished / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished / TENSORS)
    return {
        "method": options.method,
        "parameters": sum(array.size for array in arrays.values()),
        "tensors": len(arrays),
    }


ModuleTensors = dict[str, dict[str, np.ndarray]]  # by module and by the last part of a tensor's name


def shapes(modules: Mapping[str, Tensor], leaves: Flat) -> dict[str, tuple[int, int]]:
    """Returns [D, F] of the Hugging Face modules that LoRA may adapt, by name: no embeddings and no heads."""
    by_name: dict[str, tuple[int, int]] = {}
    for path, tensor in modules.items():
        D, F = leaves[f"{path}/kernel"].shape
        if not methods.EXCLUDED_MODULES.search(path):
            sizes = tensor.sizes if len(tensor.hf_names) > 1 and tensor.sizes else (F,)
            by_name |= {module_name(name): (D, size) for name, size in zip(tensor.hf_names, sizes, strict=True)}
    return by_name


def read(base: "Run", folder: Path) -> tuple[dict[str, Any], Flat]:
    """Reads a peft adapter for a run of its base.

    Several peft modules that are one module here, such as queries and values, have their ranks concatenated. A run has
    one scale for all modules: the B of a module with another scale is multiplied by the ratio.

    Returns:
      Keys of `config.finetune`, and the adapter's parameters by path.

    Raises:
      DataError: no LoRA adapter, a damaged one, one of another base, or one with unsupported options.
      ConfigError: no Hugging Face family computes the same as the model.
    """
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder} is not a peft adapter: it has no {CONFIG}")
    config = peft_config.read(hub.read_json(folder / CONFIG), str(folder / CONFIG))
    leaves, modules = paths.flat(unstack(base.params)), kernels(base)
    tensors = _read_tensors(folder, config, shapes(modules, leaves), base)
    default_scale = peft_config.scale(config.rank, config.alpha, config.rank_stabilised)
    for name, parts in tensors.items():
        parts[LORA_B] = parts[LORA_B] * np.float32(config.scale_of(name) / default_scale)
    adapter: Flat = {}
    for path, tensor in modules.items():
        pieces = [tensors.get(module_name(name), {}) for name in tensor.hf_names]
        if any(pieces):
            adapter |= _fused(path, tensor._replace(transposed=True), pieces, config, leaves)
    return {
        "method": "dora" if config.dora else "lora",
        "rank": config.rank,
        "alpha": float(config.alpha),
        "rank_stabilised": config.rank_stabilised,
    }, adapter


def load(base: "Run", folder: Path) -> "Run":
    """Returns the base with a peft adapter; raises the errors of `read`."""
    if base.config.model.scan_layers:
        raise ConfigError(f"{base.workdir} has stacked layers (model.scan_layers), which peft adapters do not support")
    options, adapter = read(base, folder)
    return adapters.attach_adapter(base, adapter, adapters.DEFAULTS | options)


def _read_tensors(
    folder: Path, config: LoraConfig, shapes: Mapping[str, tuple[int, int]], base: "Run"
) -> ModuleTensors:
    """Reads the adapter's tensors; raises DataError if one is missing, unexpected or has the wrong shape."""
    path = folder / TENSORS
    if not path.is_file():
        pickled = ", only a pickled adapter_model.bin, which is never loaded" if (folder / PICKLED).is_file() else ""
        raise DataError(f"{folder} has no {TENSORS}{pickled}; peft's save_pretrained writes one")
    stored: dict[str, dict[str, weights.Stored]] = {}
    for name, tensor in weights.stored([path]).items():
        match = NAME.fullmatch(name)
        if match is None:
            kind = "LoRA on an embedding" if "lora_embedding" in name else "not a matrix of LoRA"
            raise DataError(
                f"{path} has {name}, which is {kind}; gptjax reads LoRA on linear layers inside the model only"
            )
        stored.setdefault(match[1], {})[match[2]] = tensor
    if not stored:
        raise DataError(f"{path} is empty: it has no tensors")
    for name, parts in stored.items():
        for problem in _problems(name, parts, config, shapes.get(name), base):
            raise DataError(f"{path} {problem}")
    return {name: {part: tensor.read() for part, tensor in parts.items()} for name, parts in stored.items()}


def _problems(
    name: str, parts: Mapping[str, weights.Stored], config: LoraConfig, matrix: tuple[int, int] | None, base: "Run"
) -> Iterator[str]:
    """Yields the problems of an adapter's tensors for a module."""
    if matrix is None:
        exists = name.rsplit(".", 1)[-1] in _module_names(base)
        why = "; gptjax reads LoRA on linear layers inside the model only, not on embeddings and heads"
        yield f"adds to {name}{why if exists else f', which {base.workdir} does not have'}"
        return
    if not config.is_target(name):
        yield f"adds to {name}, which {CONFIG} does not target (target_modules, exclude_modules, layers_to_transform)"
    if MAGNITUDE in parts and not config.dora:
        yield f"has {name}.{MAGNITUDE}, which is for DoRA, but use_dora is false"
    (D, F), r = matrix, config.rank_of(name)
    shapes: dict[str, list[tuple[int, ...]]] = {LORA_A: [(r, D)], LORA_B: [(F, r)], MAGNITUDE: [(F,), (1, F)]}
    for part, allowed in shapes.items():
        if part not in parts and part != MAGNITUDE:
            yield f"lacks {name}.{part}"
        elif part in parts and parts[part].shape not in allowed:
            yield f"has {name}.{part} of shape {list(parts[part].shape)} instead of {list(allowed[0])}"
        elif part in parts and parts[part].dtype not in weights.FLOATS:
            yield f"has {name}.{part}, which is {parts[part].dtype}"


def _module_names(base: "Run") -> set[str]:
    """Returns the last parts of the names of the model's Hugging Face modules, including a tied head."""
    family, _, model, _ = match_family(base.config.model.to_dict() | {"objective": base.config.train.objective})
    names = [name for tensor in families.tensors_of(family, model) for name in tensor.hf_names]
    return {module_name(name).rsplit(".", 1)[-1] for name in [*names, *families.tied_names(family, model)]}


def _fused(path: str, tensor: Tensor, modules: list[dict[str, np.ndarray]], config: LoraConfig, leaves: Flat) -> Flat:
    """Returns the adapter of one module from those of its Hugging Face modules, {} for those without."""
    As, Bs, lengths = ([parts.get(part) for parts in modules] for part in (LORA_A, LORA_B, MAGNITUDE))
    present = [a for a in As if a is not None]
    shared = all(a is not None and np.array_equal(a, present[0]) for a in As)
    ranks = [0 if a is None else len(a) for a in As]
    R = ranks[0] if shared else sum(ranks)
    sizes = tensor.sizes if len(modules) > 1 and tensor.sizes else [leaves[f"{path}/kernel"].shape[-1]]
    pieces, start = [], 0
    for b, rank, size in zip(Bs, ranks, sizes, strict=True):
        piece = np.zeros((size, R), np.float32)
        if b is not None:
            piece[:, start : start + rank] = b
        pieces.append(piece)
        start += 0 if shared else rank
    a_DR = (present[0] if shared else np.concatenate(present)).T
    adapter = {f"{path}/lora_a": np.ascontiguousarray(a_DR), f"{path}/lora_b": from_hf(tensor, pieces)}
    if config.dora:
        adapter[f"{path}/dora"] = _magnitude_change(tensor, lengths, np.asarray(leaves[f"{path}/kernel"]))
    return adapter


def _magnitude_change(tensor: Tensor, lengths: list[np.ndarray | None], kernel_DF: np.ndarray) -> np.ndarray:
    """Returns DoRA's magnitudes minus the norms of the base's columns; 0 for modules without magnitudes."""
    norms = to_hf(tensor, np.linalg.norm(kernel_DF, axis=0))
    pieces = [norm if length is None else length.reshape(-1) for norm, length in zip(norms, lengths, strict=True)]
    return from_hf(tensor, pieces) - np.linalg.norm(kernel_DF, axis=0)
