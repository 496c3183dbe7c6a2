"""Reads and writes tensors by name in safetensors files, single or sharded with an index. No pickle is ever loaded.

It deals with names, shapes and arrays only, not with models.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config.errors import DataError
from gptjax.core import hub

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
SHARD_BYTES = 5 * 10**9
# Parts of names that torch's wrappers add: `torch.compile`, `DataParallel`, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Stored(NamedTuple):
    """A tensor in a file; `read` loads it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...

    def read(self) -> np.ndarray:
        """Returns the values as float32, which represents every bfloat16 and float16 exactly."""
        with _open(self.path) as file:
            return file.get_tensor(self.name).astype(np.float32)


def _open(path: Path) -> safe_open:
    hub.refuse_pointer(path)
    try:
        return safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def listing(folder: Path) -> dict[str, Stored]:
    """Returns the tensors of a model's folder by name, without the prefixes of torch's wrappers.

    Raises:
      DataError: no safetensors file, a damaged file, a missing shard, or a duplicate name.
    """
    return stored(_files(folder))


def stored(paths: Sequence[Path]) -> dict[str, Stored]:
    """Returns the tensors of safetensors files; names and errors are those of `listing`."""
    tensors: dict[str, Stored] = {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                piece, plain = file.get_slice(name), WRAPPERS.sub("", name)
                if plain in tensors:
                    raise DataError(f"{path} has a duplicate of {name}, which is in {tensors[plain].path.name}, too")
                tensors[plain] = Stored(path, name, tuple(piece.get_shape()), piece.get_dtype())
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = hub.read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise DataError(f"{folder / INDEX} is damaged: its weight_map names no file for each tensor")
        shards = sorted({folder / file for file in files.values()})
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise DataError(f"{folder} lacks {', '.join(absent)}, which its index names")
        return shards
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    why = f", only {', '.join(pickles)}, and pickled weights are never loaded" if pickles else ""
    raise DataError(f"{folder} has no {SINGLE}{why}; transformers' save_pretrained writes one")


def write(
    folder: Path,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[float], None] = lambda count: None,
) -> None:
    """Writes tensors to safetensors files in a folder, with an index if there are several.

    Args:
      folder: an existing folder.
      tensors: functions by name; each is called when its tensor is written.
      dtype: float32 or bfloat16.
      shard_bytes: maximum size of a file, unless a single tensor is larger.
      advance: called with the number of elements of each tensor written.
    """
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    parts: list[list[str]] = []
    total = 0
    # Temporary names, since the number of files is known only at the end.
    for number, shard in enumerate(_shards(tensors, target, shard_bytes)):
        save_file(shard, folder / f"part-{number}", metadata={"format": "pt"})
        (folder / f"part-{number}").chmod(0o644)
        parts.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        advance(sum(array.size for array in shard.values()))
    if len(parts) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    tensors: Mapping[str, Callable[[], np.ndarray]], dtype: np.dtype, limit: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, make in tensors.items():
        array = np.ascontiguousarray(make().astype(dtype))
        if shard and sum(other.nbytes for other in shard.values()) + array.nbytes > limit:
            yield shard
            shard = {}
        shard[name] = array
    yield shard
