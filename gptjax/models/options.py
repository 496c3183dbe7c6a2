"""Options of `config.model`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from gptjax.config.options import option, section
from gptjax.models import MODELS
from gptjax.models.attention import QK_NORMS
from gptjax.models.heads import HEADS, POOLINGS
from gptjax.models.kernels import KERNELS
from gptjax.models.layers import ACTIVATIONS, GATES, NORMS, RESIDUAL_INITS
from gptjax.models.mlp import MLPS
from gptjax.models.parametrization import PARAMETRIZATIONS
from gptjax.models.positions import POSITIONS
from gptjax.models.recurrent.attention import ATTENTIONS
from gptjax.models.recurrent.cells import CELLS
from gptjax.models.residuals import RESIDUALS
from gptjax.models.rotary import SCALINGS, RotaryOptions
from gptjax.models.seq2seq import DECODERS, ENCODERS
from gptjax.models.transformer import REMATS

UNROLLED = 10_000  # blocks of an unrolled program; compiling it takes an hour
KERNEL_CHOICES: Mapping[str, Any] = {"auto": None} | {
    name: kernels for name, kernels in KERNELS.items() if not kernels.transposed
}


@dataclass(frozen=True)
class RelativeOptions:
    """Biases by relative position (positions=relative, arXiv 1910.10683)."""

    buckets: int = option(32, "positions=relative: number of buckets of distances")
    longest: int = option(128, "positions=relative: distance in tokens from which on all share the last bucket")


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    arch: str = option("gpt", "decoders: gpt or recurrent; encoder (BERT); seq2seq: encoder-decoder", choices=MODELS)
    layers: int = option(4, "number of blocks; seq2seq: of the decoder", above=0)
    encoder_layers: int | None = option(None, "seq2seq: number of encoder blocks; None: same as layers", above=0)
    encoder: str = option("transformer", "seq2seq: type of the encoder", choices=ENCODERS)
    decoder: str = option("transformer", "seq2seq: type of the decoder, independent of the encoder's", choices=DECODERS)
    cell: str = option("lstm", "arch=recurrent: type of the cells", choices=CELLS)
    bidirectional: bool = option(
        True, "recurrent encoder: reads the source in both directions; its output has 2 x width columns"
    )
    attention: str = option(
        "additive", "recurrent decoder of seq2seq: additive (Bahdanau) or multiplicative (Luong)", choices=ATTENTIONS
    )
    start: int | None = option(None, "seq2seq: id of the decoder start token; None: the tokenizer's end of text")
    forced_first: int | None = option(None, "seq2seq: id that is always decoded first, as in BART; None: no such token")
    heads: int = option(4, "number of query heads", above=0)
    kv_heads: int | None = option(None, "number of key/value heads, a divisor of heads; None: same as heads", above=0)
    head_width: int | None = option(None, "size of a head; None: width / heads", above=0)
    width: int = option(128, "size of the residual stream", above=0)
    mlp_width: int | None = option(
        None, "hidden size of the MLP; None: 4 x width, or 8/3 x width if the activation is gated", above=0
    )
    context: int = option(128, "maximum number of tokens that a position attends to, including itself", above=0)
    vocabulary: int | None = option(None, "rows of the token embedding; None: the size of the tokenizer's vocabulary")
    embedding_scale: float = option(
        1.0, "factor applied to the token embeddings; arXiv 1706.03762: sqrt(width)", above=0
    )
    embedding_norm: bool = option(False, "normalize the embeddings (tokens and positions) before the first block")
    types: int = option(0, "encoder: number of token types, such as BERT's two segments; 0: no type embedding")
    positions: str = option("learned", "position encoding; relative: T5's", choices=POSITIONS)
    relative: RelativeOptions = section(RelativeOptions)
    rotary: RotaryOptions = section(RotaryOptions)
    windows: tuple[Any, ...] = option(
        (0,), "sliding window of each layer in tokens, including the token itself, repeated over the layers; 0: full"
    )
    attention_scale: float | None = option(None, "factor of the query-key products; None: 1 / sqrt(head_width)")
    qk_norm: str = option(
        "none", "RMSNorm of queries and keys; head: of each head, heads: of all at once", choices=QK_NORMS
    )
    value_residual: bool = option(False, "mix each layer's values with those of the first layer by a learned factor")
    norm: str = option("layernorm", "normalization", choices=NORMS)
    norm_position: str = option(
        "pre",
        "pre: x + f(norm(x)), output: x + norm(f(x)), parallel: x + f(norm(x)) + g(norm'(x)), these with a norm before "
        "the head; post: norm(x + f(x))",
        choices=RESIDUALS,
    )
    norm_epsilon: float = option(1e-5, "added to the variance or the mean square", above=0)
    activation: str = option(
        "gelu_tanh", "activation of the MLP; swiglu, geglu and geglu_tanh are gated", choices=ACTIVATIONS | GATES
    )
    mlp: str = option("dense", "dense, or experts: mixture of experts", choices=MLPS)
    experts: int = option(8, "number of experts", above=0)
    experts_per_token: int = option(2, "number of experts that a token is routed to", above=0)
    load_balance_loss: float = option(0.01, "weight of the load-balancing loss")
    router_z_loss: float = option(0.001, "weight of the z-loss of the router's logits")
    use_bias: bool = option(False, "biases in linear layers and layer norms")
    qkv_bias: bool | None = option(None, "biases in the query, key and value projections; None: same as use_bias")
    tied_head: bool = option(True, "use the token embedding as the output projection")
    head_bias: bool = option(False, "add a bias to the logits")
    suppress_tokens: tuple[Any, ...] = option(
        (), "with head_bias: ids that are never decoded, such as Marian's padding"
    )
    head_transform: bool = option(
        False, "encoder: add a linear layer, an activation and a norm before the head, as in BERT"
    )
    logit_scale: float = option(
        1.0, "factor applied to the input of the head; T5 with a tied head: width ** -0.5", above=0
    )
    logit_softcap: float = option(0.0, "cap logits with this times tanh(logits / this); 0: no cap")
    mtp_depth: int = option(
        0, "number of multi-token prediction heads, of one block each, for train.objective=multi_token", most=100
    )
    task: str = option("none", "additional head", choices=HEADS)
    labels: int = option(2, "classification and tagging: number of labels", above=0)
    pooling: str = option("last", "pooling of task heads; pooler: BERT's", choices=POOLINGS)
    init_std: float = option(
        0.02,
        "standard deviation of initial embeddings and matrices; recurrent: of embeddings only, where 0.1 is better",
        above=0,
        traced=True,
    )
    parametrization: str = option(
        "standard",
        "standard, or mup, which keeps hyperparameters tuned at base_width valid at any width (arXiv 2203.03466)",
        choices=dict.fromkeys(PARAMETRIZATIONS),
    )
    base_width: int | None = option(None, "mup: width at which the learning rate was tuned", above=0)
    base_head_width: int | None = option(
        None, "mup: head_width at which it was tuned; the same as head_width if heads are added instead", above=0
    )
    base_layers: int | None = option(
        None,
        "layers at which it was tuned: scales residual branches by sqrt(base_layers / layers); None: no scaling",
        above=0,
    )
    residual_init: str = option(
        "scaled",
        "initialization of matrices that write to the residual stream; scaled: by 1 / sqrt(2 layers)",
        choices=RESIDUAL_INITS,
    )
    dropout: float = option(
        0.0, "dropout rate of embeddings, attention weights and residual branches", below=1, traced=True
    )
    scan_layers: bool = option(
        False, "scan one compiled block over stacked parameters: compiles faster, runs slower on CPU"
    )
    kernels: str = option(
        "auto", "auto: by platform; plain: the reference implementation of the others", choices=KERNEL_CHOICES
    )
    remat: str = option("none", "rematerialization; dots: recompute all but matrix products", choices=REMATS)


def problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of a resolved `config.model`."""
    if model.width % model.heads and model.head_width == model.width // model.heads:
        yield f"model.heads={model.heads} does not divide model.width={model.width}; or give model.head_width"
    if model.heads % model.kv_heads:
        yield f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}"
    if model.positions == "rotary":
        rotated = int(model.head_width * model.rotary.fraction)
        if rotated % 2 or not rotated:
            of = f"model.head_width={model.head_width}" + f" x {model.rotary.fraction}" * (model.rotary.fraction != 1)
            yield f"{of} is {'odd' if rotated else 'less than 1'}; rotary positions rotate pairs of columns"
        for name in SCALINGS.keys() & model.rotary.keys():
            for problem in SCALINGS[name].problems(model.rotary[name]):
                yield f"model.rotary.{name}.{problem}"
    if not model.windows or any(type(window) is not int or window < 0 for window in model.windows):
        yield f"model.windows is {model.windows}; it must be a list of integers, such as (256, 256, 0)"
    if model.experts_per_token > model.experts:
        yield f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}"
    for key in ("layers", "encoder_layers"):
        if not model.scan_layers and (model[key] or 0) > UNROLLED:
            yield f"model.{key} is {model[key]}; more than {UNROLLED:,} blocks need model.scan_layers"
    yield from parametrization_problems(model)
    yield from suppress_problems(model)
    yield from arch_problems(model)


def parametrization_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of scaling with width and depth."""
    mup, deep = model.parametrization == "mup", model.base_layers is not None
    for key in ("base_width", "base_head_width"):
        if mup and model[key] is None:
            size = key.removeprefix("base_")
            yield f"model.parametrization=mup needs model.{key}: the {size} at which learning rates were tuned"
        if not mup and model[key] is not None:
            yield f"model.{key} is for model.parametrization=mup, not {model.parametrization}"
    if (mup or deep) and model.arch == "recurrent":
        yield "model.parametrization=mup and model.base_layers are for Transformers; model.arch is recurrent"


def suppress_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of `model.suppress_tokens`."""
    if any(type(token) is not int or token < 0 for token in model.suppress_tokens):
        yield f"model.suppress_tokens is {model.suppress_tokens}; it must list ids, such as (0,)"
    if model.suppress_tokens and not model.head_bias:
        yield f"model.suppress_tokens is {model.suppress_tokens}; it needs model.head_bias, which suppresses them"


def arch_problems(model: ConfigDict) -> Iterator[str]:
    """Yields problems of options for a single `model.arch`."""
    if model.mtp_depth and model.arch != "gpt":
        yield f"model.mtp_depth={model.mtp_depth} is for decoders, model.arch=gpt"
    if is_recurrent(model):
        for key, value in {"scan_layers": False, "remat": "none"}.items():
            if model[key] != value:
                yield f"model.{key}={model[key]} is for Transformers only; recurrent layers need {value}"


def is_recurrent(model: ConfigDict) -> bool:
    """Returns True if a `config.model` has recurrent layers."""
    return model.arch == "recurrent" or (model.arch == "seq2seq" and {model.encoder, model.decoder} != {"transformer"})
