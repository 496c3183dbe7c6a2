"""What translating a Hugging Face family takes: a neutral `config.model`, tensors' names, checks of their config."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gptjax.config.errors import DataError
from gptjax.interop.hf_config import Key, short
from gptjax.interop.weights import Stored

Known = TypeVar("Known")

# Every key of `config.model`, with values that switch nothing on; each family says what differs.
NEUTRAL: dict[str, Any] = dict(
    arch="gpt", cell="lstm", bidirectional=True, attention="additive",
    encoder_layers=None, encoder="transformer", decoder="transformer", embedding_scale=1.0,
    embedding_norm=False, types=0, relative=dict(buckets=32, longest=128), head_bias=False, head_transform=False,
    logit_scale=1.0, mtp_depth=0, task="none", labels=2, pooling="last", start=None, forced_first=None,
    suppress_tokens=(), positions="learned", windows=(0,), attention_scale=None, qk_norm=False, value_residual=False,
    rotary=dict(
        theta=10_000.0, scaling="none", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
        original_context=8192,
    ),
    norm="layernorm", norm_position="pre", norm_epsilon=1e-5, mlp="dense", activation="gelu_tanh", experts=8,
    experts_per_token=2, load_balance_loss=0.01, router_z_loss=0.001, use_bias=True, qkv_bias=True, tied_head=True,
    logit_softcap=0.0, init_std=0.02, residual_init="plain", parametrization="standard", base_width=None,
    base_head_width=None, base_layers=None, dropout=0.0, scan_layers=False, remat="none", kernels="auto",
)  # fmt: skip


class Tensor(NamedTuple):
    """One of our parameters and what it is in the family's files."""

    ours: str  # block_0/attention/qkv/kernel
    theirs: tuple[str, ...]  # side by side along our last axis
    transposed: bool = False  # theirs is [out, in]
    sizes: tuple[int, ...] | None = None  # of queries, keys and values along our last axis; None: it is one piece
    groups: int = 1  # which our last axis has one after the other, each with its part of each piece
    unused: int = 0  # rows of theirs before ours, which nothing reads
    in_front: bool = False  # theirs has an axis of one in front
    optional: bool = False  # zeros where the files lack it


class Family(NamedTuple):
    """A translation.

    Attributes:
      architecture: transformers' class, where `to_config` names no other.
      prefix: of every tensor but those that `apart` names; files of the bare trunk lack it.
      buffers: a pattern of names that files have and that hold no parameter of the model.
      keys: of transformers' config that decide what is computed.
      to_model: transformers' config, with the defaults of all keys, to `config.model`, and where that is not "causal"
        with `objective`, which says what such a model is trained for, as `config.train.objective`.
      to_config: the other way round, as near as it can be said.
      tensors: all of a model's, but the head; `config.model` may have `objective` too.
      head: the head's tensor.
      apart: how names begin that never have the prefix.
      copies: names of tensors that files may have again, for a `config.model`, besides a tied head: whose they are.
      renamed: patterns of names in old files, and what they have become.
      told: transformers' config, with what only the files' tensors tell.
    """

    architecture: str
    prefix: str
    buffers: str
    keys: Mapping[str, Key]
    to_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: Callable[[Mapping[str, Any]], list[Tensor]]
    head: str = "lm_head.weight"
    apart: tuple[str, ...] = ("lm_head.",)
    copies: Callable[[Mapping[str, Any]], dict[str, str]] = lambda model: {}
    renamed: Mapping[str, str] = {}
    told: Callable[[Mapping[str, Any], Mapping[str, Stored]], dict[str, Any]] = lambda config, found: dict(config)


def named(table: Mapping[str, Known], name: str, key: str) -> Known:
    """What is ours for one of theirs; DataError, telling what there is, where there is none."""
    if name not in table:
        raise DataError(f"config.json: {key}={short(name)} is not supported; there are {', '.join(table)}")
    return table[name]


def theirs_of(table: Mapping[str, str], name: str) -> str:
    """Their first name for one of ours; ours where they have none, which reading it back refuses."""
    return next((theirs for theirs, ours in table.items() if ours == name), name)


def needs(config: Mapping[str, Any], **expected: Any) -> None:
    """Raises DataError for a key that is not as expected: what gptjax has once where transformers has it twice."""
    for key, value in expected.items():
        if config[key] != value:
            raise DataError(f"config.json: {key}={short(config[key])} is not supported, only {value}")


def head_width(width: int, heads: int, keys: str) -> int:
    """Columns of a head; `keys`: what the two are called. Raises DataError where heads do not divide the width."""
    if width % heads:
        raise DataError(f"config.json: {keys.format(width, heads)}: the second does not divide the first")
    return width // heads


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


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def qkv(ours: str, theirs: str, m: Mapping[str, Any], names: Sequence[str] = PROJECTIONS) -> list[Tensor]:
    """Our one projection to queries, keys and values from their three."""
    return _together(ours, theirs, m, names, qkv_pieces(m))


def cross(ours: str, theirs: str, m: Mapping[str, Any], names: Sequence[str] = PROJECTIONS) -> list[Tensor]:
    """Our two projections, to queries and to keys and values of a memory, from their three."""
    width = m["kv_heads"] * m["head_width"]
    pieces = {"sizes": (width, width), "groups": m["kv_heads"]}
    queries = linear(f"{ours}/q", f"{theirs}.{names[0]}", m["qkv_bias"])
    return [*queries, *_together(f"{ours}/kv", theirs, m, names[1:], pieces)]


def _together(
    ours: str, theirs: str, m: Mapping[str, Any], names: Sequence[str], pieces: Mapping[str, Any]
) -> list[Tensor]:
    def side_by_side(leaf: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.{name}.{leaf}" for name in names)

    kernel = Tensor(f"{ours}/kernel", side_by_side("weight"), transposed=True, **pieces)
    return [kernel, *([Tensor(f"{ours}/bias", side_by_side("bias"), **pieces)] if m["qkv_bias"] else [])]
