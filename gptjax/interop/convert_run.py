"""A Hugging Face folder becomes a run, and a run a Hugging Face folder, whole or not at all.

`models/` does the arithmetic and `families.py` knows the names; here tensors are checked, moved and written.
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

from gptjax import models, objectives
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console, hub
from gptjax.core.files import appearing, is_free
from gptjax.data.tokenizers import from_hf as hf_tokenizers
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.interop import families, hf_config, weights
from gptjax.interop.families import Family, Tensor
from gptjax.interop.weights import Stored
from gptjax.models.stacking import unstack
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.run import Run

# What belongs to a tokenizer in a Hugging Face folder; a run keeps it as it came and gives it back.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt",
)  # fmt: skip
GENERATION = "generation_config.json"
PADDING = ("<pad>", "[PAD]", "<|pad|>")
OF_DECODING = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")


def flat_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{"block_0/attention/qkv/kernel": (D, (H + 2G) K), ...} for a `config.model`."""
    tree = models.shapes(models.build(dict(model, scan_layers=False)))
    return {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def expected(tensor: Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a tensor's pieces in their files, for the shape that our parameter has."""
    last = tensor.sizes if tensor.sizes and len(tensor.theirs) > 1 else (shape[-1],)
    before = (1,) if tensor.in_front else ()
    pieces = [(*before, *shape[:-1], size) for size in last]
    if tensor.unused:
        return [(piece[0] + tensor.unused, *piece[1:]) for piece in pieces]
    return [piece[::-1] if tensor.transposed else piece for piece in pieces]


def match(
    family: Family, model: Mapping[str, Any], found: Mapping[str, Stored], lacking: Mapping[str, Any] = {}
) -> dict[str, list[Stored]]:
    """The stored pieces of each of our parameters.

    Args:
      lacking: sizes that config.json does not name, and what they were taken to be, for the message.

    Raises:
      DataError: tensors that are missing, surplus or of another shape; names each.
    """
    tensors = families.tensors_of(family, model)
    taken = {name for tensor in tensors for name in tensor.theirs}
    stored = {
        name: piece
        for name, piece in by_whole_name(family, found).items()
        if name in taken or not re.search(family.buffers, name)
    }
    shapes, problems, pieces = flat_shapes(model), [], {}
    for tensor in tensors:
        wanted = dict(zip(tensor.theirs, expected(tensor, shapes[tensor.ours]), strict=True))
        pieces[tensor.ours] = [stored[name] for name in wanted if name in stored]
        problems += [f"{name} is missing" for name in wanted if name not in stored and not tensor.optional]
        problems += [
            f"{name} has shape {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ]
        problems += [f"{p.name} is {p.dtype}" for p in pieces[tensor.ours] if p.dtype not in weights.FLOATS]
    surplus = stored.keys() - taken
    for name, own in families.copies_of(family, model).items():
        if name in surplus and own in stored:
            surplus.remove(name)
            if not np.array_equal(stored[name].read(), stored[own].read()):
                problems.append(f"{name} differs from {own}, which config.json ties it to")
    problems += [f"{name} is not part of the model" for name in sorted(surplus)]
    if problems:
        taken_as = ", ".join(f"{key} ({value:,} in transformers)" for key, value in lacking.items())
        why = f", which lacks {taken_as}" if lacking else ""
        raise DataError(f"the tensors do not fit config.json{why}: {'; '.join(problems)}")
    assert pieces.keys() == shapes.keys()
    return pieces


def by_whole_name(family: Family, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """A folder's tensors by the names that they have in a whole model's files of today."""
    whole = {}
    for name, piece in found.items():
        today = name
        for old, new in family.renamed.items():
            today = re.sub(old, new, today)
        whole[today if today.startswith((family.prefix, *family.apart)) else family.prefix + today] = piece
    return whole


def to_ours(tensor: Tensor, pieces: list[np.ndarray]) -> np.ndarray:
    """Our parameter from the family's pieces."""
    pieces = [piece[0] if tensor.in_front else piece[tensor.unused :] for piece in pieces]
    parts = [piece.T if tensor.transposed else piece for piece in pieces]
    if not tensor.sizes:
        return np.ascontiguousarray(parts[0])
    if len(parts) == 1:  # side by side in one tensor
        parts = np.split(parts[0], np.cumsum(tensor.sizes)[:-1], axis=-1)
    by_group = [part.reshape(*part.shape[:-1], tensor.groups, -1) for part in parts]
    return np.concatenate(by_group, axis=-1).reshape(*parts[0].shape[:-1], -1)


def to_theirs(tensor: Tensor, ours: np.ndarray) -> list[np.ndarray]:
    """The family's pieces of our parameter: `to_ours` the other way round."""
    parts = [ours]
    if tensor.sizes:
        by_group = ours.reshape(*ours.shape[:-1], tensor.groups, -1)
        within = np.cumsum(tensor.sizes)[:-1] // tensor.groups
        parts = [part.reshape(*ours.shape[:-1], -1) for part in np.split(by_group, within, axis=-1)]
        if len(tensor.theirs) == 1:
            parts = [np.concatenate(parts, axis=-1)]
    if tensor.unused:
        parts = [np.concatenate([np.zeros((tensor.unused, *part.shape[1:]), part.dtype), part]) for part in parts]
    return [part[None] if tensor.in_front else part.T if tensor.transposed else part for part in parts]


def read_params(folder: Path, family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a folder's model as a tree of float32 NumPy arrays, a folder per block.

    What a folder need not have is zero where it has not.

    Raises:
      DataError: files or tensors that are not what they should be.
    """
    lacking = hf_config.lacking(hub.read_json(folder / "config.json"), family.keys)
    pieces = match(family, model, weights.listing(folder), lacking)
    tree: dict[str, Any] = {}
    shapes = flat_shapes(model)
    total = sum(int(np.prod(piece.shape)) for group in pieces.values() for piece in group)
    with console.bar("reading weights", total) as advance:
        for tensor in families.tensors_of(family, model):
            *folders, leaf = tensor.ours.split("/")
            at = tree
            for name in folders:
                at = at.setdefault(name, {})
            found = [piece.read() for piece in pieces[tensor.ours]]
            at[leaf] = to_ours(tensor, found) if found else np.zeros(shapes[tensor.ours], np.float32)
            advance(at[leaf].size)
    return tree


def read_model(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a folder's model, and its `config.model` with `objective`.

    Raises:
      DataError: as of families.model_of, or files that are damaged.
    """
    config = hub.read_json(folder / "config.json")
    if (folder / GENERATION).exists():  # where newer folders say what decoding needs
        told = hub.read_json(folder / GENERATION)
        config |= {key: told[key] for key in OF_DECODING if told.get(key) is not None}
    family = families.family_of(config)
    stored = by_whole_name(family, weights.listing(folder))
    # No axis is longer than the largest tensor is large, and each layer has some tensors.
    largest = max((math.prod(piece.shape) for piece in stored.values()), default=0)
    config = hf_config.read(config, family.keys, {"size": largest, "layers": len(stored)})
    return families.model_of(family.told(config, stored))


def import_run(name: str, workdir: Path, tokenizer: str = "") -> dict[str, Any]:
    """Makes a run of a Hugging Face model.

    Args:
      name: its folder, or its name on the hub.
      workdir: absent or empty.
      tokenizer: one of gptjax's own by name, where the folder has none.

    Returns:
      What was made: family, parameters, tokenizer and why it is of that kind.

    Raises:
      ConfigError: the directory is taken, or a tokenizer is needed, or there are two.
      DataError: the model is not one that gptjax can be, or its files are damaged.
    """
    if not is_free(workdir):
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
            objective=objectives.NEUTRAL_OPTIONS,
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
    """Makes a run of one that was fine-tuned, with what was added part of the matrices that it was added to.

    Raises:
      ConfigError: the directory is taken, or something was added that no matrix can hold.
    """
    return new_run(run, methods.merge(run.params, run.config.finetune), workdir, "merged")


def new_run(run: Run, params: Any, workdir: Path, made: str) -> dict[str, Any]:
    """Makes a run, not yet trained, that differs from another by its parameters; `made`: in a word, how.

    Raises:
      ConfigError: the directory is taken.
    """
    if not is_free(workdir):
        raise ConfigError(f"{workdir} exists; give another --to")
    config = ConfigDict(run.config.to_dict())
    config.init_from, config.finetune = "", ConfigDict({"method": "full"})

    def fill(unfinished: Path) -> None:
        workdirs.copy_original_tokenizer(run.workdir, unfinished)
        with Checkpoints(unfinished, keep=1) as checkpoints:
            checkpoints.save_params(0, params)

    facts = {"fingerprints": None, "imported": f"{made}:{run.workdir}"}
    workdirs.create(workdir, config, run.tokenizer, facts, fill)
    return {"method": run.config.finetune.method, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}


def _tokenizer(folder: Path, name: str) -> tuple[tokenizers.Tokenizer, str]:
    if name.startswith("bpe:") or name == "chars":
        raise ConfigError(f"--tokenizer={name} is made from a text, and there is none; take bytes or one of tiktoken's")
    if name:
        return tokenizers.build(name, []), "tiktoken.Encoding, as --tokenizer says"
    found = hf_tokenizers.read(folder)
    if found is None:
        raise ConfigError(f"{folder} has no tokenizer; name one of gptjax's, such as --tokenizer=gpt2")
    return found


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_run(
    run: Run, folder: Path, dtype: str = "float32", shard_bytes: int = weights.SHARD_BYTES
) -> dict[str, Any]:
    """Writes a run as a Hugging Face folder that transformers loads.

    Args:
      run: as gptjax.load gives it.
      folder: absent or empty.
      dtype: of the tensors, float32 or bfloat16.
      shard_bytes: the most that one file holds.

    Returns:
      What was written: family, parameters and a remark.

    Raises:
      ConfigError: the folder is taken, or no family of Hugging Face's computes what the model computes.
    """
    if not is_free(folder):
        raise ConfigError(f"{folder} exists; give another --to")
    model = run.config.model.to_dict() | {"objective": run.config.train.objective}
    family, hf_config, model, remark = match_family(model)
    ids = _ids(run.tokenizer, hf_config, model["arch"])
    shapes = flat_shapes(model)
    params = methods.merge(run.params, run.config.finetune)
    params = unstack(params) if run.config.model.scan_layers else params
    tensors = _tensors(families.tensors_of(family, model), shapes, params)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    with appearing(folder) as unfinished:
        text = json.dumps(hf_config | ids | {"dtype": dtype, "torch_dtype": dtype}, indent=2)
        (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
        if model["arch"] == "seq2seq":
            decoding = {key: hf_config[key] for key in OF_DECODING if hf_config.get(key) is not None} | ids
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
    # What transformers has to know of special tokens; their names are free, but for padding's.
    known, end = tokenizers.special_tokens(tokenizer), tokenizer.end
    start = hf_config.get("decoder_start_token_id")
    padding = next((known[name] for name in PADDING if name in known), end if start is None else start)
    ends = list(tokenizers.eos_token_ids(tokenizer))
    ids: dict[str, Any] = dict(
        bos_token_id=next(iter(tokenizer.begin), end), eos_token_id=ends if len(ends) > 1 else end
    )
    if arch == "seq2seq":
        ids |= dict(decoder_start_token_id=end if start is None else start)
    return ids if arch == "gpt" else ids | dict(pad_token_id=padding)


def match_family(model: dict[str, Any]) -> tuple[Family, dict[str, Any], dict[str, Any], str]:
    """The family that computes what a `config.model`, with `objective`, does; its config, the model as it says it, and
    a remark on what that changes. Raises ConfigError where there is none.
    """
    for changed, remark in _as_it_can_be_said(model):
        try:
            return (*families.config_of(changed), changed, remark)
        except ConfigError as error:
            last = error
    raise last


def _as_it_can_be_said(model: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    # The model; then what computes the same, or is all of it that has a place in Hugging Face's classes.
    yield model, ""
    if model["norm"] == "layernorm":
        head = dict(head_bias=True) if model["arch"] == "seq2seq" else {}
        yield dict(model, use_bias=True, qkv_bias=True, **head), "biases of zero stand where the run has none"
    if model["arch"] == "encoder" and model["task"] != "none":
        bare = dict(model, head_transform=False, head_bias=False)
        yield bare, "the head of masked words is left out, for which there is no place beside the task's"
        if model["task"] == "embedding" and model["pooling"] != "pooler":
            yield dict(model, task="none"), f"pooling ({model['pooling']}) is left to whoever reads it"
            yield dict(bare, task="none"), f"pooling ({model['pooling']}) is left to whoever reads it"


def _tensors(
    tensors: list[Tensor], shapes: Mapping[str, tuple[int, ...]], params: Any
) -> dict[str, Callable[[], np.ndarray]]:
    ours = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def make(tensor: Tensor, index: int) -> np.ndarray:
        value = ours.get(tensor.ours)
        whole = np.zeros(shapes[tensor.ours], np.float32) if value is None else np.asarray(value)
        return to_theirs(tensor, whole)[index]

    return {name: partial(make, tensor, index) for tensor in tensors for index, name in enumerate(tensor.theirs)}
