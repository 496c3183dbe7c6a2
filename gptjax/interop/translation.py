"""What translating a Hugging Face family takes: a neutral `config.model`, tensors' names, checks of their config."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config import DataError

# Every key of `config.model`, with values that switch nothing on; each family says what differs.
NEUTRAL: dict[str, Any] = dict(
    arch="gpt", positions="learned", windows=(0,), attention_scale=None, qk_norm=False, value_residual=False,
    rotary=dict(
        theta=10_000.0, scaling="none", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
        original_context=8192,
    ),
    norm="layernorm", norm_position="pre", norm_epsilon=1e-5, mlp="dense", activation="gelu_tanh", experts=8,
    experts_per_token=2, load_balance_loss=0.01, router_z_loss=0.001, use_bias=True, qkv_bias=True, tied_head=True,
    logit_softcap=0.0, init_std=0.02, residual_init="plain", dropout=0.0, scan_layers=False, remat="none",
    kernels="auto",
)  # fmt: skip


class Tensor(NamedTuple):
    """One of our parameters and what it is in the family's files."""

    ours: str  # block_0/attention/qkv/kernel
    theirs: tuple[str, ...]  # side by side along our last axis
    transposed: bool = False  # theirs is [out, in]
    sizes: tuple[int, ...] | None = None  # of queries, keys and values along our last axis; None: it is one piece
    groups: int = 1  # which our last axis has one after the other, each with its part of each piece


class Family(NamedTuple):
    """A translation.

    Attributes:
      architecture: transformers' class.
      prefix: of every tensor but the head's; files of the bare trunk lack it.
      buffers: a pattern of names that old files have and that hold no parameter.
      to_model: transformers' config to `config.model`.
      to_config: `config.model` to transformers' config, as near as it can be said.
      tensors: all of a model's, but the head.
    """

    architecture: str
    prefix: str
    buffers: str
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: Callable[[Mapping[str, Any]], list[Tensor]]


def named(table: Mapping[str, str], name: str, key: str) -> str:
    """Our name for one of theirs; DataError, telling what there is, where there is none."""
    if name not in table:
        raise DataError(f"config.json: {key}={name} is not supported; there are {', '.join(table)}")
    return table[name]


def theirs_of(table: Mapping[str, str], name: str) -> str:
    """Their first name for one of ours; ours where they have none, which reading it back refuses."""
    return next((theirs for theirs, ours in table.items() if ours == name), name)


def needs(config: Mapping[str, Any], **expected: Any) -> None:
    """Raises DataError for a key that is there and is not as expected: a switch that gptjax does not have."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise DataError(f"config.json: {key}={config[key]} is not supported, only {value}")


def pattern(windows: list[int]) -> tuple[int, ...]:
    """The shortest run of windows that, repeated, gives one for each layer."""
    lengths = range(1, len(windows) + 1)
    shortest = next(n for n in lengths if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[:shortest])


def each_layer(model: Mapping[str, Any]) -> list[int]:
    """The window of each layer; 0 also where it holds the whole context."""
    windows = [model["windows"][i % len(model["windows"])] for i in range(model["layers"])]
    return [0 if window >= model["context"] else window for window in windows]


def norm(ours: str, theirs: str) -> list[Tensor]:
    """Scale and bias of a layer norm."""
    return [Tensor(f"{ours}/scale", (f"{theirs}.weight",)), Tensor(f"{ours}/bias", (f"{theirs}.bias",))]


def conv(ours: str, theirs: str, **pieces: Any) -> list[Tensor]:
    """Kernel and bias of GPT-2's `Conv1D`, which is [in, out] as ours; `pieces`: sizes and groups of both."""
    names = ("kernel", "weight"), ("bias", "bias")
    return [Tensor(f"{ours}/{own}", (f"{theirs}.{their}",), **pieces) for own, their in names]


def linear(ours: str, theirs: str, bias: bool) -> list[Tensor]:
    """Kernel, and bias where there is one, of torch's `Linear`."""
    biases = [Tensor(f"{ours}/bias", (f"{theirs}.bias",))] if bias else []
    return [Tensor(f"{ours}/kernel", (f"{theirs}.weight",), transposed=True), *biases]


def qkv_pieces(m: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and groups of queries, keys and values in our one projection."""
    K = m["head_width"]
    return {"sizes": (m["heads"] * K, m["kv_heads"] * K, m["kv_heads"] * K), "groups": m["kv_heads"]}


def qkv(ours: str, theirs: str, m: Mapping[str, Any]) -> list[Tensor]:
    """Our one projection to queries, keys and values from their three."""

    def side_by_side(leaf: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.{name}_proj.{leaf}" for name in "qkv")

    kernel = Tensor(f"{ours}/kernel", side_by_side("weight"), transposed=True, **qkv_pieces(m))
    return [kernel, *([Tensor(f"{ours}/bias", side_by_side("bias"), **qkv_pieces(m))] if m["qkv_bias"] else [])]
