"""LoRA adapters as `peft` has them, both ways: names and shapes of Hugging Face's modules, safetensors, no pickles."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gptjax.config import ConfigError, DataError
from gptjax.files import appearing, is_free
from gptjax.finetune import adapters, paths
from gptjax.finetune.paths import Flat
from gptjax.interop import families
from gptjax.interop.transfer import family_that_says, to_ours, to_theirs
from gptjax.interop.translation import Tensor
from gptjax.models.stacking import unstack

if TYPE_CHECKING:
    from gptjax.run import Run

FACTS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
METHODS = ("lora", "dora")


def kernels(of: "Run") -> dict[str, Tensor]:
    """The tensor of each module's matrix by the module's path; [out, in] where peft's are [in, out], too.

    Raises:
      ConfigError: no family of Hugging Face's is this model.
    """
    family, _, model, _ = family_that_says(of.config.model.to_dict() | {"objective": of.config.train.objective})
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
    for name in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        tensor, arrays = (
            known[name]._replace(transposed=True),
            {key: np.asarray(leaves[f"{name}/{key}"]) for key in ("lora_a", "lora_b")},
        )
        for theirs, b_out_r in zip(tensor.theirs, to_theirs(tensor, arrays["lora_b"]), strict=True):
            found[f"{PREFIX}{module(theirs)}.lora_A.weight"] = arrays["lora_a"].T
            found[f"{PREFIX}{module(theirs)}.lora_B.weight"] = b_out_r
        if options.method == "dora":
            length_F = np.linalg.norm(leaves[f"{name}/kernel"], axis=0) + np.asarray(leaves[f"{name}/dora"])
            for theirs, length in zip(tensor.theirs, to_theirs(tensor, length_F), strict=True):
                found[f"{PREFIX}{module(theirs)}.lora_magnitude_vector"] = length
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if of.config.model.arch == "gpt" else None,
        "base_model_name_or_path": of.config.init_from.removeprefix("hf:"),
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rank_stabilised,
        "use_dora": options.method == "dora",
        "target_modules": sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in found}),
        "fan_in_fan_out": any(not tensor.transposed for tensor in known.values()),
        "bias": "none",
    }
    with appearing(folder) as unfinished:
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, unfinished / TENSORS)
    return {"method": options.method, "parameters": sum(array.size for array in found.values()), "tensors": len(found)}


def read(base: "Run", folder: Path) -> tuple[dict[str, Any], Flat]:
    """(`config.finetune`'s keys, what was tuned by path) of an adapter of peft's, for a run of its base.

    Where peft has several modules, such as queries and values, and the house one, their ranks come one after another.

    Raises:
      DataError: no LoRA adapter, one that is damaged, or of modules that this model has not.
      ConfigError: no family of Hugging Face's is this model.
    """
    facts, found = _files(folder)
    if facts.get("peft_type") != "LORA" or facts.get("bias", "none") != "none" or facts.get("rank_pattern"):
        raise DataError(f"{folder} is no LoRA adapter without biases and with one rank, which is what is read here")
    tuned: Flat = {}
    leaves = paths.flat(unstack(base.params))
    for name, tensor in kernels(base).items():
        keys = [PREFIX + module(theirs) for theirs in tensor.theirs]
        there = [key for key in keys if f"{key}.lora_A.weight" in found]
        if there:
            tuned |= _joined(name, tensor._replace(transposed=True), keys, found, facts, leaves)
    surplus = sorted(found)
    if surplus:
        raise DataError(f"{folder} adds to {surplus[0].rsplit('.lora_', 1)[0]}, which {base.workdir} has not")
    method = "dora" if facts.get("use_dora") else "lora"
    return {
        "method": method,
        "rank": facts["r"],
        "alpha": float(facts["lora_alpha"]),
        "rank_stabilised": bool(facts.get("use_rslora", False)),
    }, tuned


def load(base: "Run", folder: Path) -> "Run":
    """The base with an adapter of peft's on it; errors as of `read`."""
    if base.config.model.scan_layers:
        raise ConfigError(
            f"{base.workdir} has stacked layers (model.scan_layers), and adapters of peft's have single ones"
        )
    options, tuned = read(base, folder)
    return adapters.beside(base, tuned, adapters.PLAIN | options)


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} is no adapter of peft's: it has no {FACTS}")
    try:
        found = {name: array.astype(np.float32) for name, array in load_file(folder / TENSORS).items()}
        return json.loads((folder / FACTS).read_text()), found
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {str(error).splitlines()[0][:200]}") from error


def _joined(
    name: str, tensor: Tensor, keys: list[str], found: dict[str, np.ndarray], facts: dict[str, Any], leaves: Flat
) -> Flat:
    """One module of ours from its several of theirs, which are taken out of `found`."""
    firsts = [found.pop(f"{key}.lora_A.weight", None) for key in keys]
    seconds = [found.pop(f"{key}.lora_B.weight", None) for key in keys]
    lengths = [found.pop(f"{key}.lora_magnitude_vector", None) for key in keys]
    present = [a for a in firsts if a is not None]
    shared = all(a is not None and np.array_equal(a, present[0]) for a in firsts)
    ranks = [0 if a is None else len(a) for a in firsts]
    R = ranks[0] if shared else sum(ranks)
    sizes = tensor.sizes if len(keys) > 1 and tensor.sizes else [leaves[f"{name}/kernel"].shape[-1]]
    pieces, start = [], 0
    for b, rank, size in zip(seconds, ranks, sizes, strict=True):
        piece = np.zeros((size, R), np.float32)
        if b is not None:
            piece[:, start : start + rank] = b
        pieces.append(piece)
        start += 0 if shared else rank
    a_DR = (present[0] if shared else np.concatenate(present)).T
    tuned = {f"{name}/lora_a": np.ascontiguousarray(a_DR), f"{name}/lora_b": to_ours(tensor, pieces)}
    if facts.get("use_dora"):
        tuned[f"{name}/dora"] = _longer(tensor, lengths, np.asarray(leaves[f"{name}/kernel"]))
    return tuned


def _longer(tensor: Tensor, lengths: list[np.ndarray | None], kernel_DF: np.ndarray) -> np.ndarray:
    """How much longer DoRA's columns are than the base's; where it has none, not at all."""
    own = to_theirs(tensor, np.linalg.norm(kernel_DF, axis=0))
    found = [base if length is None else length.reshape(-1) for base, length in zip(own, lengths, strict=True)]
    wanted = to_ours(tensor, found)
    return wanted - np.linalg.norm(kernel_DF, axis=0)
