"""A Hugging Face folder becomes a run, and a run a Hugging Face folder, whole or not at all.

`models/` does the arithmetic and `families.py` knows the names; here tensors are checked, moved and written.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gptjax import console, models
from gptjax import workdir as workdirs
from gptjax.config import ConfigError, DataError
from gptjax.data import tokenizers
from gptjax.files import appearing, is_free
from gptjax.interop import families, hub, weights
from gptjax.interop import tokenizers as hf_tokenizers
from gptjax.interop.families import Family, Tensor
from gptjax.interop.weights import Stored
from gptjax.models.stacking import unstack
from gptjax.run import Run
from gptjax.training.checkpoints import Checkpoints

# What belongs to a tokenizer in a Hugging Face folder; a run keeps it as it came and gives it back.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


def flat_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{"block_0/attention/qkv/kernel": (D, (H + 2G) K), ...} for a `config.model`."""
    tree = models.shapes(models.build(dict(model, scan_layers=False)))
    return {_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(keys: Any) -> str:
    return "/".join(key.key for key in keys)


def expected(tensor: Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of a tensor's pieces in their files, for the shape that our parameter has."""
    last = tensor.sizes if tensor.sizes and len(tensor.theirs) > 1 else (shape[-1],)
    pieces = [(*shape[:-1], size) for size in last]
    return [piece[::-1] if tensor.transposed else piece for piece in pieces]


def match(family: Family, model: Mapping[str, Any], found: Mapping[str, Stored]) -> dict[str, list[Stored]]:
    """The stored pieces of each of our parameters.

    Raises:
      DataError: tensors that are missing, surplus or of another shape; names each.
    """
    stored = {}
    for name, piece in found.items():
        if not re.search(family.buffers, name):
            whole = name.startswith((family.prefix, "lm_head."))
            stored[name if whole else family.prefix + name] = piece
    shapes, problems, pieces = flat_shapes(model), [], {}
    for tensor in families.tensors_of(family, model):
        wanted = dict(zip(tensor.theirs, expected(tensor, shapes[tensor.ours]), strict=True))
        pieces[tensor.ours] = [stored[name] for name in wanted if name in stored]
        problems += [f"{name} is missing" for name in wanted if name not in stored]
        problems += [
            f"{name} has shape {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ]
        problems += [f"{p.name} is {p.dtype}" for p in pieces[tensor.ours] if p.dtype not in weights.FLOATS]
    taken = {name for tensor in families.tensors_of(family, model) for name in tensor.theirs}
    surplus = stored.keys() - taken
    if model["tied_head"] and "lm_head.weight" in surplus and not problems:
        surplus.remove("lm_head.weight")
        if not np.array_equal(stored["lm_head.weight"].read(), pieces["tokens/embedding"][0].read()):
            problems.append("lm_head.weight differs from the token embedding that config.json ties it to")
    problems += [f"{name} is not part of the model" for name in sorted(surplus)]
    if problems:
        raise DataError(f"the tensors do not fit config.json: {'; '.join(problems)}")
    assert pieces.keys() == shapes.keys()
    return pieces


def to_ours(tensor: Tensor, pieces: list[np.ndarray]) -> np.ndarray:
    """Our parameter from the family's pieces."""
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
    return [part.T if tensor.transposed else part for part in parts]


def read_params(folder: Path, family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a folder's model as a tree of float32 NumPy arrays, a folder per block.

    Raises:
      DataError: files or tensors that are not what they should be.
    """
    pieces = match(family, model, weights.listing(folder))
    tree: dict[str, Any] = {}
    total = sum(int(np.prod(piece.shape)) for group in pieces.values() for piece in group)
    with console.bar("reading weights", total) as advance:
        for tensor in families.tensors_of(family, model):
            *folders, leaf = tensor.ours.split("/")
            at = tree
            for name in folders:
                at = at.setdefault(name, {})
            at[leaf] = to_ours(tensor, [piece.read() for piece in pieces[tensor.ours]])
            advance(at[leaf].size)
    return tree


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
    hf_config = hub.read_json(folder / "config.json")
    family, model = families.model_of(hf_config)
    chosen, why = _tokenizer(folder, tokenizer)
    if chosen.n_vocab > model["vocabulary"]:
        raise DataError(f"the tokenizer has {chosen.n_vocab} ids, but the model {model['vocabulary']} rows for them")
    params = read_params(folder, family, model)
    config = ConfigDict(
        dict(
            seed=0,
            init_from="",
            model=model,
            data=dict(tokenizer=chosen.name, context=min(model["context"], 1024), batch_size=8),
            train=dict(objective="causal", dtype="float32"),
        )
    )

    def fill(unfinished: Path) -> None:
        if not tokenizer:
            (unfinished / "tokenizer" / "hf").mkdir()
            _copy_tokenizer(folder, unfinished / "tokenizer" / "hf")
        with Checkpoints(unfinished, keep=1) as checkpoints:
            checkpoints.save_params(0, params)

    workdirs.create(workdir, config, chosen, {"fingerprints": None, "imported": f"hf:{name}"}, fill)
    return {
        "family": hf_config["model_type"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokenizer": chosen.name,
        "tokenizer_kind": why,
    }


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
    model = run.config.model.to_dict()
    family, hf_config, model, remark = _family(model)
    ids = dict(bos_token_id=next(iter(run.tokenizer.begin), run.tokenizer.end), eos_token_id=run.tokenizer.end)
    shapes = flat_shapes(model)
    params = unstack(run.params) if run.config.model.scan_layers else run.params
    tensors = _tensors(families.tensors_of(family, model), shapes, params)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    with appearing(folder) as unfinished:
        text = json.dumps(hf_config | ids | {"dtype": dtype, "torch_dtype": dtype}, indent=2)
        (unfinished / "config.json").write_text(text + "\n")
        original = run.workdir / "tokenizer" / "hf"
        if original.is_dir():
            _copy_tokenizer(original, unfinished)
        else:
            hf_tokenizers.write(run.tokenizer, unfinished)
        with console.bar("writing weights", total) as advance:
            weights.write(unfinished, tensors, dtype, shard_bytes, advance)
    return {"family": hf_config["model_type"], "parameters": total, "remark": remark}


def _family(model: dict[str, Any]) -> tuple[Family, dict[str, Any], dict[str, Any], str]:
    try:
        return (*families.config_of(model), model, "")
    except ConfigError:
        if model["use_bias"] or model["norm"] != "layernorm":
            raise
        # GPT-2 without biases is GPT-2 whose biases are zero.
        biased = dict(model, use_bias=True, qkv_bias=True)
        return (*families.config_of(biased), biased, "biases of zero stand where the run has none")


def _tensors(
    tensors: list[Tensor], shapes: Mapping[str, tuple[int, ...]], params: Any
) -> dict[str, Callable[[], np.ndarray]]:
    ours = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def make(tensor: Tensor, index: int) -> np.ndarray:
        value = ours.get(tensor.ours)
        whole = np.zeros(shapes[tensor.ours], np.float32) if value is None else np.asarray(value)
        return to_theirs(tensor, whole)[index]

    return {name: partial(make, tensor, index) for tensor in tensors for index, name in enumerate(tensor.theirs)}
