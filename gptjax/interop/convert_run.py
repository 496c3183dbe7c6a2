"""Converts a Hugging Face folder to a run and a run to a Hugging Face folder; both are written atomically.

gptjax.interop.families maps configs and names; this module checks, converts and writes tensors.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gptjax import models
from gptjax.config.errors import ConfigError, DataError
from gptjax.config.options import defaults
from gptjax.core import console, hub
from gptjax.core.files import atomic_directory, is_new_or_empty
from gptjax.data.tokenizers import from_hf as hf_tokenizers
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.interop import families, hf_config, weights
from gptjax.interop.families import Family
from gptjax.interop.weight_mapping import Tensor, from_hf, hf_shapes, to_hf
from gptjax.interop.weights import Stored
from gptjax.models.stacking import unstack
from gptjax.objectives.options import ObjectiveOptions
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.run import Run

# Tokenizer files of a Hugging Face folder; a run keeps them unchanged and exports them again.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt",
)  # fmt: skip
GENERATION = "generation_config.json"
PADDING = ("<pad>", "[PAD]", "<|pad|>")
GENERATION_KEYS = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")


def flat_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns {"block_0/attention/qkv/kernel": (D, (H + 2G) K), ...} for a `config.model`."""
    tree = models.shapes(models.build(dict(model, scan_layers=False)))
    return {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def match_tensors(
    family: Family, model: Mapping[str, Any], checkpoint: Mapping[str, Stored], missing_sizes: Mapping[str, Any] = {}
) -> dict[str, list[Stored]]:
    """Returns the stored tensors of each parameter.

    Args:
      family: the model's family.
      model: its `config.model`.
      checkpoint: tensors by name.
      missing_sizes: sizes that config.json lacks, with the defaults used instead, for the message.

    Raises:
      DataError: missing or unexpected tensors, or wrong shapes; the message names each.
    """
    tensors = families.tensors_of(family, model)
    expected = {name for tensor in tensors for name in tensor.hf_names}
    stored = {
        name: piece
        for name, piece in full_names(family, checkpoint).items()
        if name in expected or not re.search(family.buffers, name)
    }
    shapes, problems, pieces = flat_shapes(model), [], {}
    for tensor in tensors:
        wanted = dict(zip(tensor.hf_names, hf_shapes(tensor, shapes[tensor.name]), strict=True))
        pieces[tensor.name] = [stored[name] for name in wanted if name in stored]
        problems += [f"{name} is missing" for name in wanted if name not in stored and not tensor.optional]
        problems += [
            f"{name} has shape {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ]
        problems += [f"{p.name} is {p.dtype}" for p in pieces[tensor.name] if p.dtype not in weights.FLOATS]
    surplus = stored.keys() - expected
    for name, original in families.tied_names(family, model).items():
        if name in surplus and original in stored:
            surplus.remove(name)
            if not np.array_equal(stored[name].read(), stored[original].read()):
                problems.append(f"{name} differs from {original}, which config.json ties it to")
    problems += [f"{name} is not part of the model" for name in sorted(surplus)]
    if problems:
        defaults = ", ".join(f"{key} ({value:,} in transformers)" for key, value in missing_sizes.items())
        why = f", which lacks {defaults}" if missing_sizes else ""
        raise DataError(f"the tensors do not fit config.json{why}: {'; '.join(problems)}")
    assert pieces.keys() == shapes.keys()
    return pieces


def full_names(family: Family, checkpoint: Mapping[str, Stored]) -> dict[str, Stored]:
    """Returns a checkpoint's tensors by their current names, with the family's prefix."""
    tensors = {}
    for name, piece in checkpoint.items():
        current = name
        for old, new in family.renames.items():
            current = re.sub(old, new, current)
        has_prefix = current.startswith((family.prefix, *family.unprefixed))
        tensors[current if has_prefix else family.prefix + current] = piece
    return tensors


def read_params(folder: Path, family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the parameters of a model as a tree of float32 NumPy arrays, with a subtree per block.

    Optional tensors that the checkpoint lacks are zero.

    Raises:
      DataError: damaged files, or tensors that do not fit the model.
    """
    defaults = hf_config.missing_sizes(hub.read_json(folder / "config.json"), family.keys)
    pieces = match_tensors(family, model, weights.listing(folder), defaults)
    tree: dict[str, Any] = {}
    shapes = flat_shapes(model)
    total = sum(int(np.prod(piece.shape)) for group in pieces.values() for piece in group)
    with console.bar("reading weights", total) as advance:
        for tensor in families.tensors_of(family, model):
            *parents, leaf = tensor.name.split("/")
            subtree = tree
            for name in parents:
                subtree = subtree.setdefault(name, {})
            arrays = [piece.read() for piece in pieces[tensor.name]]
            subtree[leaf] = from_hf(tensor, arrays) if arrays else np.zeros(shapes[tensor.name], np.float32)
            advance(subtree[leaf].size)
    return tree


def read_model(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Returns the family of a folder's model, and its `config.model` with `objective`.

    Raises:
      DataError: damaged files, or the errors of families.model_of.
    """
    config = hub.read_json(folder / "config.json")
    if (folder / GENERATION).exists():  # newer folders have the keys for decoding there
        generation = hub.read_json(folder / GENERATION)
        config |= {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None}
    family = families.family_of(config)
    stored = full_names(family, weights.listing(folder))
    # Bounds: no axis is longer than the largest tensor has elements, and each layer has at least one tensor.
    largest = max((math.prod(piece.shape) for piece in stored.values()), default=0)
    config = hf_config.read(config, family.keys, {"size": largest, "layers": len(stored)})
    return families.model_of(family.infer(config, stored))


def import_run(name: str, workdir: Path, tokenizer: str = "") -> dict[str, Any]:
    """Converts a Hugging Face model to a run.

    Args:
      name: its folder, or its name on the hub.
      workdir: new or empty directory.
      tokenizer: name of one of gptjax's tokenizers, if the folder has none.

    Returns:
      Family, number of parameters, tokenizer and the reason for the tokenizer's type.

    Raises:
      ConfigError: the directory is not empty, or a tokenizer is missing.
      DataError: the model is not supported, or its files are damaged.
    """
    if not is_new_or_empty(workdir):
        raise ConfigError(f"{workdir} exists; give another --to")
    folder = hub.find(name)
    family, model = read_model(folder)
    chosen, why = _tokenizer(folder, tokenizer)
    chat_template = None if tokenizer else hf_tokenizers.chat_template(folder)
    if chosen.n_vocab > model["vocabulary"]:
        raise DataError(f"the tokenizer has {chosen.n_vocab} ids, but the model {model['vocabulary']} rows for them")
    params, objective = read_params(folder, family, model), model.pop("objective")
    config = ConfigDict(
        dict(
            seed=0,
            init_from="",
            model=model,
            data=dict(
                tokenizer=chosen.name,
                context=min(model["context"], 1024),
                batch_size=8,
                layout="flat",
                languages=(),
                examples=dict(form=""),
            ),
            objective=defaults(ObjectiveOptions).to_dict(),
            finetune=dict(method="full"),
            train=dict(objective=objective, dtype="float32"),
        )
    )

    def fill(unfinished: Path) -> None:
        if not tokenizer:
            (unfinished / "tokenizer" / "hf").mkdir()
            _copy_tokenizer(folder, unfinished / "tokenizer" / "hf")
        if chat_template is not None:
            (unfinished / workdirs.CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        with Checkpoints(unfinished, keep=1) as checkpoints:
            checkpoints.save_params(0, params)

    workdirs.create(workdir, config, chosen, {"fingerprints": None, "imported": f"hf:{name}"}, fill)
    return {
        "family": next(name for name, one in families.FAMILIES.items() if one is family),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokenizer": chosen.name,
        "tokenizer_kind": why,
    }


def merge_run(run: Run, workdir: Path) -> dict[str, Any]:
    """Writes a run whose adapters are merged into the weights of the fine-tuned run's base.

    Raises:
      ConfigError: the directory is not empty, or the adapter cannot be merged.
    """
    return new_run(run, methods.merge(run.params, run.config.finetune), workdir, "merged")


def new_run(run: Run, params: Any, workdir: Path, origin: str) -> dict[str, Any]:
    """Writes a run at step 0 that differs from another by its parameters; `origin` records how they were made.

    Raises:
      ConfigError: the directory is not empty.
    """
    if not is_new_or_empty(workdir):
        raise ConfigError(f"{workdir} exists; give another --to")
    config = ConfigDict(run.config.to_dict())
    config.init_from, config.finetune = "", ConfigDict({"method": "full"})

    def fill(unfinished: Path) -> None:
        workdirs.copy_original_tokenizer(run.workdir, unfinished)
        with Checkpoints(unfinished, keep=1) as checkpoints:
            checkpoints.save_params(0, params)

    facts = {"fingerprints": None, "imported": f"{origin}:{run.workdir}"}
    workdirs.create(workdir, config, run.tokenizer, facts, fill)
    return {"method": run.config.finetune.method, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}


def _tokenizer(folder: Path, name: str) -> tuple[tokenizers.Tokenizer, str]:
    if name.startswith("bpe:") or name == "chars":
        raise ConfigError(f"--tokenizer={name} is made from a text, and there is none; take bytes or one of tiktoken's")
    if name:
        return tokenizers.build(name, []), "tiktoken.Encoding, as --tokenizer says"
    tokenizer = hf_tokenizers.read(folder)
    if tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer; name one of gptjax's, such as --tokenizer=gpt2")
    return tokenizer


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_run(
    run: Run, folder: Path, dtype: str = "float32", shard_bytes: int = weights.SHARD_BYTES
) -> dict[str, Any]:
    """Writes a run as a Hugging Face folder that transformers loads.

    Args:
      run: a run opened by gptjax.load.
      folder: new or empty folder.
      dtype: float32 or bfloat16.
      shard_bytes: maximum size of a file.

    Returns:
      Family, number of parameters and a remark.

    Raises:
      ConfigError: the folder is not empty, or no Hugging Face family computes the same as the model.
    """
    if not is_new_or_empty(folder):
        raise ConfigError(f"{folder} exists; give another --to")
    model = run.config.model.to_dict() | {"objective": run.config.train.objective}
    family, hf_config, model, remark = match_family(model)
    ids = _ids(run.tokenizer, hf_config, model["arch"])
    shapes = flat_shapes(model)
    params = methods.merge(run.params, run.config.finetune)
    params = unstack(params) if run.config.model.scan_layers else params
    tensors = _tensors(families.tensors_of(family, model), shapes, params)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    with atomic_directory(folder) as unfinished:
        text = json.dumps(hf_config | ids | {"dtype": dtype, "torch_dtype": dtype}, indent=2)
        (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
        if model["arch"] == "seq2seq":
            decoding = {key: hf_config[key] for key in GENERATION_KEYS if hf_config.get(key) is not None} | ids
            (unfinished / GENERATION).write_text(json.dumps(decoding, indent=2) + "\n", encoding="utf-8")
        original = run.workdir / "tokenizer" / "hf"
        if original.is_dir():
            _copy_tokenizer(original, unfinished)
        else:
            hf_tokenizers.write(run.tokenizer, unfinished, closes=model["arch"] != "gpt")
        if (run.workdir / workdirs.CHAT_TEMPLATE).exists():
            shutil.copyfile(run.workdir / workdirs.CHAT_TEMPLATE, unfinished / "chat_template.jinja")
        with console.bar("writing weights", total) as advance:
            weights.write(unfinished, tensors, dtype, shard_bytes, advance)
    (architecture,) = hf_config["architectures"]
    return {
        "family": hf_config["model_type"],
        "architecture": architecture,
        "parameters": total,
        "remark": remark,
    }


def _ids(tokenizer: tokenizers.Tokenizer, hf_config: Mapping[str, Any], arch: str) -> dict[str, Any]:
    # Ids of special tokens in transformers' config; padding is found by its name.
    special, end = tokenizers.special_tokens(tokenizer), tokenizer.end
    start = hf_config.get("decoder_start_token_id")
    padding = next((special[name] for name in PADDING if name in special), end if start is None else start)
    ends = list(tokenizers.eos_token_ids(tokenizer))
    ids: dict[str, Any] = dict(
        bos_token_id=next(iter(tokenizer.begin), end), eos_token_id=ends if len(ends) > 1 else end
    )
    if arch == "seq2seq":
        ids |= dict(decoder_start_token_id=end if start is None else start)
    return ids if arch == "gpt" else ids | dict(pad_token_id=padding)


def match_family(model: dict[str, Any]) -> tuple[Family, dict[str, Any], dict[str, Any], str]:
    """Returns the Hugging Face family of a `config.model` with `objective`.

    Returns:
      The family, its config, the `config.model` that it represents, and a remark on what differs in that.

    Raises:
      ConfigError: no family matches.
    """
    for changed, remark in _exportable(model):
        try:
            return (*families.config_of(changed), changed, remark)
        except ConfigError as error:
            last = error
    raise last


def _exportable(model: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    # The model itself; then equivalent ones, or the part of it that Hugging Face's classes have.
    yield model, ""
    if model["norm"] == "layernorm":
        head = dict(head_bias=True) if model["arch"] == "seq2seq" else {}
        yield dict(model, use_bias=True, qkv_bias=True, **head), "biases that the run does not have are zero"
    if model["arch"] == "encoder" and model["task"] != "none":
        bare = dict(model, head_transform=False, head_bias=False)
        yield bare, "the masked language model head is left out, as the class has only the task's"
        if model["task"] == "embedding" and model["pooling"] != "pooler":
            yield dict(model, task="none"), f"pooling ({model['pooling']}) is not part of the exported model"
            yield dict(bare, task="none"), f"pooling ({model['pooling']}) is not part of the exported model"


def _tensors(
    tensors: list[Tensor], shapes: Mapping[str, tuple[int, ...]], params: Any
) -> dict[str, Callable[[], np.ndarray]]:
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def make(tensor: Tensor, index: int) -> np.ndarray:
        value = leaves.get(tensor.name)
        whole = np.zeros(shapes[tensor.name], np.float32) if value is None else np.asarray(value)
        return to_hf(tensor, whole)[index]

    return {name: partial(make, tensor, index) for tensor in tensors for index, name in enumerate(tensor.hf_names)}
