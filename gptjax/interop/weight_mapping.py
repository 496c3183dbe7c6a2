"""Building blocks of a Hugging Face family: a neutral `config.model`, maps of parameter names, checks of configs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gptjax.config.errors import DataError
from gptjax.config.options import defaults
from gptjax.interop.hf_config import Key, abbreviated
from gptjax.interop.weights import Stored
from gptjax.models.options import ModelOptions

T = TypeVar("T")

# Every key of `config.model`, with all options off; each family sets what differs.
NEUTRAL: dict[str, Any] = defaults(ModelOptions).to_dict() | dict(use_bias=True, qkv_bias=True, residual_init="plain")


class Tensor(NamedTuple):
    """A parameter and the tensors of a checkpoint that hold it.

    Attributes:
      name: path of the parameter, such as block_0/attention/qkv/kernel.
      hf_names: names of the checkpoint's tensors, concatenated along the parameter's last axis.
      transposed: the checkpoint's layout is [out, in].
      sizes: sizes of queries, keys and values along the last axis; None: a single tensor.
      groups: number of groups that the last axis interleaves, each with its part of every tensor.
      skip_rows: unused first rows of the checkpoint's tensor.
      leading_axis: the checkpoint's tensor has a leading axis of size 1.
      optional: zeros if the checkpoint has no such tensor.
    """

    name: str
    hf_names: tuple[str, ...]
    transposed: bool = False
    sizes: tuple[int, ...] | None = None
    groups: int = 1
    skip_rows: int = 0
    leading_axis: bool = False
    optional: bool = False


class Family(NamedTuple):
    """Conversion between a family of transformers' models and `config.model`.

    Attributes:
      architecture: class name in transformers, unless `to_config` gives another.
      prefix: prefix of all tensor names except those in `unprefixed`; checkpoints of the base model lack it.
      buffers: regular expression of tensor names that hold no parameter.
      keys: keys of transformers' config that affect the computation.
      to_model: maps transformers' config, with all defaults filled in, to `config.model`. Adds `objective`, the
        `config.train.objective` of such a model, unless it is "causal".
      to_config: maps `config.model` to transformers' config, as closely as possible.
      tensors: lists the tensors of a `config.model`, which may have `objective`, except the head.
      head: tensor name of the head.
      unprefixed: beginnings of the names that never have `prefix`.
      tied: maps a `config.model` to names of duplicate tensors and of their originals, besides a tied head.
      renames: regular expressions of tensor names in old checkpoints, and their replacements.
      infer: completes transformers' config by what only the checkpoint's tensors tell.
    """

    architecture: str
    prefix: str
    buffers: str
    keys: Mapping[str, Key]
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: Callable[[Mapping[str, Any]], list[Tensor]]
    head: str = "lm_head.weight"
    unprefixed: tuple[str, ...] = ("lm_head.",)
    tied: Callable[[Mapping[str, Any]], dict[str, str]] = lambda model: {}
    renames: Mapping[str, str] = {}
    infer: Callable[[Mapping[str, Any], Mapping[str, Stored]], dict[str, Any]] = lambda config, tensors: dict(config)


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """Returns `table[name]`; raises DataError, with the names that the table has, if it is missing."""
    if name not in table:
        raise DataError(f"config.json: {key}={abbreviated(name)} is not supported; there are {', '.join(table)}")
    return table[name]


def hf_name_of(table: Mapping[str, str], name: str) -> str:
    """Returns the first key of a value; the value itself if it has none, which reading it back refuses."""
    return next((hf_name for hf_name, value in table.items() if value == name), name)


def require(config: Mapping[str, Any], **expected: Any) -> None:
    """Raises DataError if a key does not have its expected value, such as one that gptjax shares with another key."""
    for key, value in expected.items():
        if config[key] != value:
            raise DataError(f"config.json: {key}={abbreviated(config[key])} is not supported, only {value}")


def head_width(width: int, heads: int, keys: str) -> int:
    """Returns the size of a head; raises DataError, with `keys` as the format of both, if heads do not divide width."""
    if width % heads:
        raise DataError(f"config.json: {keys.format(width, heads)}: the second does not divide the first")
    return width // heads


def window_pattern(windows: list[int]) -> tuple[int, ...]:
    """Returns the shortest sequence of windows that repeats over all layers."""
    lengths = range(1, len(windows) + 1)
    shortest = next(n for n in lengths if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[:shortest])


def layer_windows(model: Mapping[str, Any]) -> list[int]:
    """Returns the window of each layer; 0 if it covers the whole context."""
    windows = [model["windows"][i % len(model["windows"])] for i in range(model["layers"])]
    return [0 if window >= model["context"] else window for window in windows]


def norm(name: str, hf_name: str) -> list[Tensor]:
    """Scale and bias of a layer norm."""
    return [Tensor(f"{name}/scale", (f"{hf_name}.weight",)), Tensor(f"{name}/bias", (f"{hf_name}.bias",))]


def conv(name: str, hf_name: str, **layout: Any) -> list[Tensor]:
    """Kernel and bias of GPT-2's `Conv1D`, stored as [in, out]; `layout` gives the sizes and groups of both."""
    leaves = ("kernel", "weight"), ("bias", "bias")
    return [Tensor(f"{name}/{leaf}", (f"{hf_name}.{hf_leaf}",), **layout) for leaf, hf_leaf in leaves]


def linear(name: str, hf_name: str, bias: bool) -> list[Tensor]:
    """Kernel, and bias if there is one, of torch's `Linear`."""
    biases = [Tensor(f"{name}/bias", (f"{hf_name}.bias",))] if bias else []
    return [Tensor(f"{name}/kernel", (f"{hf_name}.weight",), transposed=True), *biases]


def qkv_layout(m: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and groups of queries, keys and values in the fused projection."""
    K = m["head_width"]
    return {"sizes": (m["heads"] * K, m["kv_heads"] * K, m["kv_heads"] * K), "groups": m["kv_heads"]}


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def qkv(name: str, hf_name: str, m: Mapping[str, Any], projections: Sequence[str] = PROJECTIONS) -> list[Tensor]:
    """The fused query, key and value projection from three separate ones."""
    return _concatenated(name, hf_name, m, projections, qkv_layout(m))


def cross(name: str, hf_name: str, m: Mapping[str, Any], projections: Sequence[str] = PROJECTIONS) -> list[Tensor]:
    """Cross-attention's query projection and fused key and value projection from three separate ones."""
    width = m["kv_heads"] * m["head_width"]
    layout = {"sizes": (width, width), "groups": m["kv_heads"]}
    queries = linear(f"{name}/q", f"{hf_name}.{projections[0]}", m["qkv_bias"])
    return [*queries, *_concatenated(f"{name}/kv", hf_name, m, projections[1:], layout)]


def _concatenated(
    name: str, hf_name: str, m: Mapping[str, Any], projections: Sequence[str], layout: Mapping[str, Any]
) -> list[Tensor]:
    def hf_names(leaf: str) -> tuple[str, ...]:
        return tuple(f"{hf_name}.{projection}.{leaf}" for projection in projections)

    kernel = Tensor(f"{name}/kernel", hf_names("weight"), transposed=True, **layout)
    return [kernel, *([Tensor(f"{name}/bias", hf_names("bias"), **layout)] if m["qkv_bias"] else [])]


def hf_shapes(tensor: Tensor, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the shapes in the checkpoint of the tensors that make a parameter of the given shape."""
    last = tensor.sizes if tensor.sizes and len(tensor.hf_names) > 1 else (shape[-1],)
    before = (1,) if tensor.leading_axis else ()
    pieces = [(*before, *shape[:-1], size) for size in last]
    if tensor.skip_rows:
        return [(piece[0] + tensor.skip_rows, *piece[1:]) for piece in pieces]
    return [piece[::-1] if tensor.transposed else piece for piece in pieces]


def from_hf(tensor: Tensor, pieces: list[np.ndarray]) -> np.ndarray:
    """Returns a parameter from the tensors of a checkpoint."""
    pieces = [piece[0] if tensor.leading_axis else piece[tensor.skip_rows :] for piece in pieces]
    parts = [piece.T if tensor.transposed else piece for piece in pieces]
    if not tensor.sizes:
        return np.ascontiguousarray(parts[0])
    if len(parts) == 1:  # concatenated in the checkpoint, too
        parts = np.split(parts[0], np.cumsum(tensor.sizes)[:-1], axis=-1)
    by_group = [part.reshape(*part.shape[:-1], tensor.groups, -1) for part in parts]
    return np.concatenate(by_group, axis=-1).reshape(*parts[0].shape[:-1], -1)


def to_hf(tensor: Tensor, value: np.ndarray) -> list[np.ndarray]:
    """Returns the tensors of a checkpoint from a parameter; inverse of `from_hf`."""
    parts = [value]
    if tensor.sizes:
        by_group = value.reshape(*value.shape[:-1], tensor.groups, -1)
        within = np.cumsum(tensor.sizes)[:-1] // tensor.groups
        parts = [part.reshape(*value.shape[:-1], -1) for part in np.split(by_group, within, axis=-1)]
        if len(tensor.hf_names) == 1:
            parts = [np.concatenate(parts, axis=-1)]
    if tensor.skip_rows:
        parts = [np.concatenate([np.zeros((tensor.skip_rows, *part.shape[1:]), part.dtype), part]) for part in parts]
    return [part[None] if tensor.leading_axis else part.T if tensor.transposed else part for part in parts]
