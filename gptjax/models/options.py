"""Options of `config.model`."""

from dataclasses import dataclass
from typing import Any

from gptjax.config.options import option, section


@dataclass(frozen=True)
class RelativeOptions:
    """`config.model.relative`: ."""

    buckets: int = option(32, "positions=relative: number of buckets of distances")
    longest: int = option(128, "positions=relative: distance in tokens from which on all share the last bucket")


@dataclass(frozen=True)
class RotaryOptions:
    """`config.model.rotary`: ."""

    theta: float = option(
        10000.0,
        "base of the rotary frequencies; the longest wavelength is about 2 pi theta tokens",
        above=0,
    )
    scaling: str = option("none", "context extension: none, linear or llama3")
    factor: float = option(8.0, "linear and llama3: ratio of the extended context to original_context", above=0)
    low_frequency_factor: float = option(
        1.0,
        "llama3: frequencies with fewer periods than this in original_context are scaled",
    )
    high_frequency_factor: float = option(
        4.0,
        "llama3: frequencies with more periods than this in original_context are kept",
    )
    original_context: int = option(8192, "llama3: context in tokens before the extension")


@dataclass(frozen=True)
class ModelOptions:
    """`config.model`: ."""

    arch: str = option("gpt", "gpt or recurrent (decoders), encoder (BERT) or seq2seq (encoder-decoder)")
    layers: int = option(4, "number of blocks; seq2seq: of the decoder", above=0)
    encoder_layers: int | None = option(None, "seq2seq: number of encoder blocks; None: same as layers", above=0)
    encoder: str = option("transformer", "seq2seq: type of the encoder: transformer, rnn, gru or lstm")
    decoder: str = option(
        "transformer",
        "seq2seq: type of the decoder, independent of the encoder's: transformer, rnn, gru or lstm",
    )
    cell: str = option("lstm", "arch=recurrent: rnn, gru or lstm")
    bidirectional: bool = option(
        True,
        "recurrent encoder: reads the source in both directions; its output has 2 x width columns",
    )
    attention: str = option("additive", "recurrent decoder of seq2seq: additive (Bahdanau) or multiplicative (Luong)")
    start: int | None = option(None, "seq2seq: id of the decoder start token; None: the tokenizer's end of text")
    forced_first: int | None = option(None, "seq2seq: id that is always decoded first, as in BART; None: no such token")
    heads: int = option(4, "number of query heads", above=0)
    kv_heads: int | None = option(None, "number of key/value heads, a divisor of heads; None: same as heads", above=0)
    head_width: int | None = option(None, "size of a head; None: width / heads", above=0)
    width: int = option(128, "size of the residual stream", above=0)
    mlp_width: int | None = option(
        None,
        "hidden size of the MLP; None: 4 x width, or 8/3 x width if the activation is gated",
        above=0,
    )
    context: int = option(128, "maximum number of tokens that a position attends to, including itself", above=0)
    vocabulary: int | None = option(None, "rows of the token embedding; None: the size of the tokenizer's vocabulary")
    embedding_scale: float = option(
        1.0,
        "factor applied to the token embeddings; arXiv 1706.03762: sqrt(width)",
        above=0,
    )
    embedding_norm: bool = option(False, "normalize the embeddings (tokens and positions) before the first block")
    types: int = option(0, "encoder: number of token types, such as BERT's two segments; 0: no type embedding")
    positions: str = option("learned", "learned, sinusoidal, sinusoidal_halves, rotary, alibi, relative (T5) or none")
    relative: RelativeOptions = section(RelativeOptions)
    rotary: RotaryOptions = section(RotaryOptions)
    windows: tuple[Any, ...] = option(
        (0,),
        "sliding window of each layer in tokens, including the token itself, repeated over the layers; 0: "
        "full",
    )
    attention_scale: float | None = option(None, "factor of the query-key products; None: 1 / sqrt(head_width)")
    qk_norm: bool = option(False, "RMSNorm of each head's queries and keys")
    value_residual: bool = option(False, "mix each layer's values with those of the first layer by a learned factor")
    norm: str = option("layernorm", "layernorm or rmsnorm")
    norm_position: str = option("pre", "pre: x + f(norm(x)), with a norm before the head; post: norm(x + f(x))")
    norm_epsilon: float = option(1e-5, "added to the variance or the mean square", above=0)
    activation: str = option("gelu_tanh", "gelu, gelu_tanh, relu, relu2, silu; gated: swiglu, geglu, geglu_tanh")
    mlp: str = option("dense", "dense, or experts (mixture of experts)")
    experts: int = option(8, "number of experts", above=0)
    experts_per_token: int = option(2, "number of experts that a token is routed to", above=0)
    load_balance_loss: float = option(0.01, "weight of the load-balancing loss")
    router_z_loss: float = option(0.001, "weight of the z-loss of the router's logits")
    use_bias: bool = option(False, "biases in linear layers and layer norms")
    qkv_bias: bool | None = option(None, "biases in the query, key and value projections; None: same as use_bias")
    tied_head: bool = option(True, "use the token embedding as the output projection")
    head_bias: bool = option(False, "add a bias to the logits")
    suppress_tokens: tuple[Any, ...] = option(
        (),
        "with head_bias: ids that are never decoded, such as Marian's padding",
    )
    head_transform: bool = option(
        False,
        "encoder: add a linear layer, an activation and a norm before the head, as in BERT",
    )
    logit_scale: float = option(
        1.0,
        "factor applied to the input of the head; T5 with a tied head: width ** -0.5",
        above=0,
    )
    logit_softcap: float = option(0.0, "cap logits with this times tanh(logits / this); 0: no cap")
    mtp_depth: int = option(
        0,
        "number of multi-token prediction heads, of one block each, for train.objective=multi_token",
        most=100,
    )
    task: str = option("none", "additional head: none, classification, tagging, span, choice, regression or embedding")
    labels: int = option(2, "classification and tagging: number of labels", above=0)
    pooling: str = option("last", "pooling of task heads: first, last, mean or pooler (BERT's)")
    init_std: float = option(
        0.02,
        "standard deviation of initial embeddings and matrices; recurrent: of embeddings only, where 0.1 is "
        "better",
        above=0,
    )
    parametrization: str = option(
        "standard",
        "standard or mup, which keeps hyperparameters tuned at base_width valid at any width (arXiv "
        "2203.03466)",
    )
    base_width: int | None = option(None, "mup: width at which the learning rate was tuned", above=0)
    base_head_width: int | None = option(
        None,
        "mup: head_width at which it was tuned; the same as head_width if heads are added instead",
        above=0,
    )
    base_layers: int | None = option(
        None,
        "layers at which it was tuned: scales residual branches by sqrt(base_layers / layers); None: no "
        "scaling",
        above=0,
    )
    residual_init: str = option(
        "scaled",
        "initialization of matrices that write to the residual stream: plain, scaled (1/sqrt(2L)) or zero",
    )
    dropout: float = option(0.0, "dropout rate of embeddings, attention weights and residual branches", below=1)
    scan_layers: bool = option(
        False,
        "scan one compiled block over stacked parameters: compiles faster, runs slower on CPU",
    )
    kernels: str = option(
        "auto",
        "auto (by platform), cpu, gpu, tpu or plain, the reference implementation of the others",
    )
    remat: str = option("none", "rematerialization: none, dots (recompute all but matrix products) or full")
