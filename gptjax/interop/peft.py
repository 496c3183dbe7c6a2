"""LoRA adapters as `peft` has them, both ways: names and shapes of Hugging Face's modules, safetensors, no pickles."""

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
from gptjax.core.files import appearing, is_free
from gptjax.finetune import methods, paths
from gptjax.finetune.paths import Flat
from gptjax.interop import families, peft_config, weights
from gptjax.interop.convert_run import match_family, to_ours, to_theirs
from gptjax.interop.peft_config import LoraConfig
from gptjax.interop.weight_mapping import Tensor
from gptjax.models.stacking import unstack
from gptjax.runs import adapters

if TYPE_CHECKING:
    from gptjax.runs.run import Run

FACTS, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FIRST, SECOND, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
NAME = re.compile(rf"{re.escape(PREFIX)}(.+)\.({re.escape(FIRST)}|{re.escape(SECOND)}|{LENGTHS})")
METHODS = ("lora", "dora")


def kernels(of: "Run") -> dict[str, Tensor]:
    """The tensor of each module's matrix by the module's path; [out, in] where peft's are [in, out], too.

    Raises:
      ConfigError: no family of Hugging Face's is this model.
    """
    family, _, model, _ = match_family(of.config.model.to_dict() | {"objective": of.config.train.objective})
    own = [tensor for tensor in families.tensors_of(family, model) if tensor.ours.endswith("/kernel")]
    return {tensor.ours.removesuffix("/kernel"): tensor for tensor in own}


def module(name: str) -> str:
    """Their module whose weight a tensor is."""
    return name.removesuffix(".weight")


def save(of: "Run", folder: Path) -> dict[str, Any]:
    """Writes what a run tuned by LoRA or DoRA as a folder that `peft.PeftModel.from_pretrained` loads on its base.

    Raises:
      ConfigError: another method, a taken folder, or a model that no family of Hugging Face's is.
    """
    options = of.config.finetune
    if options.method not in METHODS:
        raise ConfigError(f"peft has LoRA's form alone here; {of.workdir} was tuned by {options.method}")
    if not is_free(folder):
        raise ConfigError(f"{folder} exists; give another folder")
    leaves, known = paths.flat(unstack(of.params)), kernels(of)
    found: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}  # of modules with another rank than the run's, such as several of peft's in one
    for name in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        tensor, arrays = (
            known[name]._replace(transposed=True),
            {key: np.asarray(leaves[f"{name}/{key}"]) for key in ("lora_a", "lora_b")},
        )
        for theirs, b_out_r in zip(tensor.theirs, to_theirs(tensor, arrays["lora_b"]), strict=True):
            found[f"{PREFIX}{module(theirs)}.lora_A.weight"] = arrays["lora_a"].T
            found[f"{PREFIX}{module(theirs)}.lora_B.weight"] = b_out_r
            if b_out_r.shape[1] != options.rank:
                ranks[module(theirs)] = b_out_r.shape[1]
        if options.method == "dora":
            length_F = np.linalg.norm(leaves[f"{name}/kernel"], axis=0) + np.asarray(leaves[f"{name}/dora"])
            for theirs, length in zip(tensor.theirs, to_theirs(tensor, length_F), strict=True):
                found[f"{PREFIX}{module(theirs)}.lora_magnitude_vector"] = length
    factor = partial(peft_config.scale, alpha=1.0, rank_stabilised=options.rank_stabilised)
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if of.config.model.arch == "gpt" else None,
        "base_model_name_or_path": of.config.init_from.removeprefix("hf:"),
        "r": options.rank,
        "lora_alpha": options.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {name: options.alpha * factor(options.rank) / factor(R) for name, R in ranks.items()},
        "lora_dropout": options.dropout,
        "use_rslora": options.rank_stabilised,
        "use_dora": options.method == "dora",
        "target_modules": sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in found}),
        "fan_in_fan_out": any(not tensor.transposed for tensor in known.values()),
        "bias": "none",
    }
    with appearing(folder) as unfinished:
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, unfinished / TENSORS)
    return {"method": options.method, "parameters": sum(array.size for array in found.values()), "tensors": len(found)}


Parts = dict[str, dict[str, np.ndarray]]  # by module and by the last part of a tensor's name


def shapes(known: Mapping[str, Tensor], leaves: Flat) -> dict[str, tuple[int, int]]:
    """[D, F] of their modules that LoRA may add to, by name: products inside the model, no embeddings and no heads."""
    found: dict[str, tuple[int, int]] = {}
    for ours, tensor in known.items():
        D, F = leaves[f"{ours}/kernel"].shape
        if not methods.EXCLUDED_MODULES.search(ours):
            sizes = tensor.sizes if len(tensor.theirs) > 1 and tensor.sizes else (F,)
            found |= {module(theirs): (D, size) for theirs, size in zip(tensor.theirs, sizes, strict=True)}
    return found


def read(base: "Run", folder: Path) -> tuple[dict[str, Any], Flat]:
    """(`config.finetune`'s keys, what was tuned by path) of an adapter of peft's, for a run of its base.

    Where peft has several modules, such as queries and values, and the house one, their ranks come one after another.
    A run has one scale for all modules: where a module's own is another, its B is so many times as large.

    Raises:
      DataError: no LoRA adapter, one that is damaged or of another base, or one that computes what gptjax does not.
      ConfigError: no family of Hugging Face's is this model.
    """
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} is no adapter of peft's: it has no {FACTS}")
    config = peft_config.read(hub.read_json(folder / FACTS), str(folder / FACTS))
    leaves, known = paths.flat(unstack(base.params)), kernels(base)
    found = _parts(folder, config, shapes(known, leaves), base)
    usual = peft_config.scale(config.rank, config.alpha, config.rank_stabilised)
    for name, parts in found.items():
        parts[SECOND] = parts[SECOND] * np.float32(config.scale_of(name) / usual)
    tuned: Flat = {}
    for ours, tensor in known.items():
        theirs = [found.get(module(name), {}) for name in tensor.theirs]
        if any(theirs):
            tuned |= _joined(ours, tensor._replace(transposed=True), theirs, config, leaves)
    return {
        "method": "dora" if config.dora else "lora",
        "rank": config.rank,
        "alpha": float(config.alpha),
        "rank_stabilised": config.rank_stabilised,
    }, tuned


def load(base: "Run", folder: Path) -> "Run":
    """The base with an adapter of peft's on it; errors as of `read`."""
    if base.config.model.scan_layers:
        raise ConfigError(
            f"{base.workdir} has stacked layers (model.scan_layers), and adapters of peft's have single ones"
        )
    options, tuned = read(base, folder)
    return adapters.attach_adapter(base, tuned, adapters.DEFAULTS | options)


def _parts(folder: Path, config: LoraConfig, known: Mapping[str, tuple[int, int]], base: "Run") -> Parts:
    """The adapter's tensors; DataError where one is missing, surplus or of another shape."""
    path = folder / TENSORS
    if not path.is_file():
        pickled = ", only a pickled adapter_model.bin, which is never loaded" if (folder / PICKLED).is_file() else ""
        raise DataError(f"{folder} has no {TENSORS}{pickled}; peft's save_pretrained writes one")
    stored: dict[str, dict[str, weights.Stored]] = {}
    for name, tensor in weights.stored([path]).items():
        match = NAME.fullmatch(name)
        if match is None:
            kind = "LoRA on an embedding" if "lora_embedding" in name else "no matrix of LoRA's"
            raise DataError(f"{path} has {name}, which is {kind}; gptjax reads LoRA on products inside the model alone")
        stored.setdefault(match[1], {})[match[2]] = tensor
    if not stored:
        raise DataError(f"{path} is empty: it has no tensors")
    for name, parts in stored.items():
        for problem in _problems(name, parts, config, known.get(name), base):
            raise DataError(f"{path} {problem}")
    return {name: {part: tensor.read() for part, tensor in parts.items()} for name, parts in stored.items()}


def _problems(
    name: str, parts: Mapping[str, weights.Stored], config: LoraConfig, matrix: tuple[int, int] | None, base: "Run"
) -> Iterator[str]:
    """What is wrong with an adapter's tensors of a module."""
    if matrix is None:
        known = name.rsplit(".", 1)[-1] in _all_modules(base)
        why = "; gptjax reads LoRA on products inside the model alone, not on embeddings and heads"
        yield f"adds to {name}{why if known else f', which {base.workdir} has not'}"
        return
    if not config.is_target(name):
        yield f"adds to {name}, to which {FACTS} adds nothing (target_modules, exclude_modules, layers_to_transform)"
    if LENGTHS in parts and not config.dora:
        yield f"has {name}.{LENGTHS}, which is DoRA's, but use_dora is false"
    (D, F), r = matrix, config.rank_of(name)
    shapes: dict[str, list[tuple[int, ...]]] = {FIRST: [(r, D)], SECOND: [(F, r)], LENGTHS: [(F,), (1, F)]}
    for part, allowed in shapes.items():
        if part not in parts and part != LENGTHS:
            yield f"lacks {name}.{part}"
        elif part in parts and parts[part].shape not in allowed:
            yield f"has {name}.{part} of shape {list(parts[part].shape)} instead of {list(allowed[0])}"
        elif part in parts and parts[part].dtype not in weights.FLOATS:
            yield f"has {name}.{part}, which is {parts[part].dtype}"


def _all_modules(base: "Run") -> set[str]:
    """Last parts of the names of all modules of theirs that the model has, the head too where it is tied."""
    family, _, model, _ = match_family(base.config.model.to_dict() | {"objective": base.config.train.objective})
    names = [name for tensor in families.tensors_of(family, model) for name in tensor.theirs]
    return {module(name).rsplit(".", 1)[-1] for name in [*names, *families.copies_of(family, model)]}


def _joined(name: str, tensor: Tensor, theirs: list[dict[str, np.ndarray]], config: LoraConfig, leaves: Flat) -> Flat:
    """One module of ours from its several of theirs; {} for one to which nothing is added."""
    firsts, seconds, lengths = ([parts.get(part) for parts in theirs] for part in (FIRST, SECOND, LENGTHS))
    present = [a for a in firsts if a is not None]
    shared = all(a is not None and np.array_equal(a, present[0]) for a in firsts)
    ranks = [0 if a is None else len(a) for a in firsts]
    R = ranks[0] if shared else sum(ranks)
    sizes = tensor.sizes if len(theirs) > 1 and tensor.sizes else [leaves[f"{name}/kernel"].shape[-1]]
    pieces, start = [], 0
    for b, rank, size in zip(seconds, ranks, sizes, strict=True):
        piece = np.zeros((size, R), np.float32)
        if b is not None:
            piece[:, start : start + rank] = b
        pieces.append(piece)
        start += 0 if shared else rank
    a_DR = (present[0] if shared else np.concatenate(present)).T
    tuned = {f"{name}/lora_a": np.ascontiguousarray(a_DR), f"{name}/lora_b": to_ours(tensor, pieces)}
    if config.dora:
        tuned[f"{name}/dora"] = _longer(tensor, lengths, np.asarray(leaves[f"{name}/kernel"]))
    return tuned


def _longer(tensor: Tensor, lengths: list[np.ndarray | None], kernel_DF: np.ndarray) -> np.ndarray:
    """How much longer DoRA's columns are than the base's; where it has none, not at all."""
    own = to_theirs(tensor, np.linalg.norm(kernel_DF, axis=0))
    found = [base if length is None else length.reshape(-1) for base, length in zip(own, lengths, strict=True)]
    wanted = to_ours(tensor, found)
    return wanted - np.linalg.norm(kernel_DF, axis=0)
