"""The families of Hugging Face models that gptjax can be: their configs and tensor names, both ways.

Each family is a translation of `config.model` and a list of which tensors make which parameter. Pure functions of
dictionaries; nothing here reads a file.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config import ConfigError, DataError, flatten

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
)  # fmt: skip

# transformers' activation names; the first of ours is what is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
OPENAI_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


class Tensor(NamedTuple):
    """One of our parameters and what it is in the family's files."""

    ours: str  # block_0/attention/qkv/kernel
    theirs: tuple[str, ...]  # side by side along our last axis
    transposed: bool = False  # theirs is [out, in]
    sizes: tuple[int, ...] | None = None  # of the pieces along our last axis; None: one piece, all of it


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


def _named(table: Mapping[str, str], name: str, key: str) -> str:
    if name not in table:
        raise DataError(f"config.json: {key}={name} is not supported; there are {', '.join(table)}")
    return table[name]


def _theirs(table: Mapping[str, str], name: str) -> str:
    return next((theirs for theirs, ours in table.items() if ours == name), name)


def _needs(config: Mapping[str, Any], **expected: Any) -> None:
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


# GPT-2


def _gpt2_model(h: Mapping[str, Any]) -> dict[str, Any]:
    _needs(h, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return NEUTRAL | dict(
        layers=h["n_layer"], heads=h["n_head"], kv_heads=h["n_head"], head_width=h["n_embd"] // h["n_head"],
        width=h["n_embd"], mlp_width=h.get("n_inner") or 4 * h["n_embd"], context=h["n_positions"],
        vocabulary=h["vocab_size"], norm_epsilon=h.get("layer_norm_epsilon", 1e-5), residual_init="scaled",
        activation=_named(ACTIVATIONS, h.get("activation_function", "gelu_new"), "activation_function"),
        tied_head=h.get("tie_word_embeddings", True), dropout=h.get("resid_pdrop", 0.1),
        init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _gpt2_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        n_layer=m["layers"], n_head=m["heads"], n_embd=m["width"], n_inner=m["mlp_width"], n_positions=m["context"],
        vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=_theirs(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        resid_pdrop=m["dropout"], embd_pdrop=m["dropout"], attn_pdrop=m["dropout"], initializer_range=m["init_std"],
    )  # fmt: skip


def _norm(ours: str, theirs: str) -> list[Tensor]:
    return [Tensor(f"{ours}/scale", (f"{theirs}.weight",)), Tensor(f"{ours}/bias", (f"{theirs}.bias",))]


def _conv(ours: str, theirs: str) -> list[Tensor]:
    return [Tensor(f"{ours}/kernel", (f"{theirs}.weight",)), Tensor(f"{ours}/bias", (f"{theirs}.bias",))]


def _linear(ours: str, theirs: str, bias: bool) -> list[Tensor]:
    biases = [Tensor(f"{ours}/bias", (f"{theirs}.bias",))] if bias else []
    return [Tensor(f"{ours}/kernel", (f"{theirs}.weight",), transposed=True), *biases]


def _openai_block(i: int) -> list[Tensor]:
    ours, theirs = f"block_{i}", f"transformer.h.{i}"
    return [
        *_norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *_conv(f"{ours}/attention/qkv", f"{theirs}.attn.c_attn"),
        *_conv(f"{ours}/attention/out", f"{theirs}.attn.c_proj"),
        *_conv(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *_conv(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]


def _gpt2_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *_norm("final_norm", "transformer.ln_f")]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i)]


# GPT-1


def _gpt1_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return NEUTRAL | dict(
        layers=h["n_layer"], heads=h["n_head"], kv_heads=h["n_head"], head_width=h["n_embd"] // h["n_head"],
        width=h["n_embd"], mlp_width=4 * h["n_embd"], context=h["n_positions"], vocabulary=h["vocab_size"],
        norm_epsilon=h.get("layer_norm_epsilon", 1e-5), norm_position="post",
        activation=_named(OPENAI_ACTIVATIONS, h.get("afn", "gelu"), "afn"),
        tied_head=h.get("tie_word_embeddings", True), dropout=h.get("resid_pdrop", 0.1),
        init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _gpt1_config(m: Mapping[str, Any]) -> dict[str, Any]:
    config = _gpt2_config(m)
    for key in ("n_inner", "activation_function"):
        del config[key]
    return config | dict(afn=_theirs(OPENAI_ACTIVATIONS, m["activation"]))


def _gpt1_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.tokens_embed.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.positions_embed.weight",))]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i)]


# GPT-Neo


def _neo_model(h: Mapping[str, Any]) -> dict[str, Any]:
    kinds = h.get("attention_layers") or [
        kind for names, times in h["attention_types"] for _ in range(times) for kind in names
    ]
    windows = [{"global": 0, "local": h.get("window_size", 256)}[kind] for kind in kinds]
    if len(windows) != h["num_layers"]:
        raise DataError(f"config.json: attention_types speak of {len(windows)} layers, num_layers of {h['num_layers']}")
    D, H = h["hidden_size"], h["num_heads"]
    return NEUTRAL | dict(
        layers=h["num_layers"], heads=H, kv_heads=H, head_width=D // H, width=D, context=h["max_position_embeddings"],
        mlp_width=h.get("intermediate_size") or 4 * D, vocabulary=h["vocab_size"], windows=pattern(windows),
        attention_scale=1.0, qkv_bias=False, norm_epsilon=h.get("layer_norm_epsilon", 1e-5),
        activation=_named(ACTIVATIONS, h.get("activation_function", "gelu_new"), "activation_function"),
        tied_head=h.get("tie_word_embeddings", True), dropout=h.get("resid_dropout", 0.0),
        init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _neo_config(m: Mapping[str, Any]) -> dict[str, Any]:
    windows = each_layer(m)
    kinds = ["local" if window else "global" for window in windows]
    return dict(
        num_layers=m["layers"], num_heads=m["heads"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        max_position_embeddings=m["context"], vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=_theirs(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_types=[[kinds, 1]], attention_layers=kinds, window_size=max(windows) or 256,
        resid_dropout=m["dropout"], embed_dropout=m["dropout"], attention_dropout=m["dropout"],
        initializer_range=m["init_std"],
    )  # fmt: skip


def _qkv_sizes(m: Mapping[str, Any]) -> tuple[int, int, int]:
    K = m["head_width"]
    return m["heads"] * K, m["kv_heads"] * K, m["kv_heads"] * K


def _qkv(ours: str, theirs: str, m: Mapping[str, Any]) -> list[Tensor]:
    def side_by_side(leaf: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.{name}_proj.{leaf}" for name in "qkv")

    kernel = Tensor(f"{ours}/kernel", side_by_side("weight"), transposed=True, sizes=_qkv_sizes(m))
    return [kernel, *([Tensor(f"{ours}/bias", side_by_side("bias"), sizes=_qkv_sizes(m))] if m["qkv_bias"] else [])]


def _neo_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    found = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    found += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *_norm("final_norm", "transformer.ln_f")]
    for i in range(m["layers"]):
        ours, theirs = f"block_{i}", f"transformer.h.{i}"
        found += _norm(f"{ours}/attention_norm", f"{theirs}.ln_1")
        found += _norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
        found += _qkv(f"{ours}/attention/qkv", f"{theirs}.attn.attention", m)
        found += _linear(f"{ours}/attention/out", f"{theirs}.attn.attention.out_proj", bias=True)
        found += _linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", bias=True)
        found += _linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", bias=True)
    return found


# Llama, Mistral, Qwen2, Qwen3


def _rotary(h: Mapping[str, Any]) -> dict[str, Any]:
    rope = h.get("rope_parameters") or {**(h.get("rope_scaling") or {}), "rope_theta": h.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = _named({"default": "none", "linear": "linear", "llama3": "llama3"}, kind, "rope_type")
    _needs(rope, partial_rotary_factor=1.0)
    names = dict(
        factor="factor", low_frequency_factor="low_freq_factor", high_frequency_factor="high_freq_factor",
        original_context="original_max_position_embeddings",
    )  # fmt: skip
    given = {ours: rope[theirs] for ours, theirs in names.items() if scaling != "none" and theirs in rope}
    return NEUTRAL["rotary"] | dict(theta=float(rope["rope_theta"]), scaling=scaling) | given


def _rope(m: Mapping[str, Any]) -> dict[str, Any]:
    r = m["rotary"]
    scaling = dict(rope_type=r["scaling"], factor=r["factor"])
    if r["scaling"] == "llama3":
        scaling |= dict(
            low_freq_factor=r["low_frequency_factor"], high_freq_factor=r["high_frequency_factor"],
            original_max_position_embeddings=r["original_context"],
        )  # fmt: skip
    return dict(rope_theta=r["theta"], rope_scaling=None if r["scaling"] == "none" else scaling)


def _llama_model(h: Mapping[str, Any]) -> dict[str, Any]:
    D, H = h["hidden_size"], h["num_attention_heads"]
    bias = h.get("mlp_bias", False)
    _needs(h, attention_bias=bias)
    return NEUTRAL | dict(
        layers=h["num_hidden_layers"], heads=H, kv_heads=h.get("num_key_value_heads") or H,
        head_width=h.get("head_dim") or D // H, width=D, mlp_width=h["intermediate_size"],
        context=h["max_position_embeddings"], vocabulary=h["vocab_size"], positions="rotary", rotary=_rotary(h),
        norm="rmsnorm", norm_epsilon=h.get("rms_norm_eps", 1e-6), use_bias=bias, qkv_bias=bias,
        activation=_named(GATED_ACTIVATIONS, h.get("hidden_act", "silu"), "hidden_act"),
        tied_head=h.get("tie_word_embeddings", False), init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _llama_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"],
        head_dim=m["head_width"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        max_position_embeddings=m["context"], vocab_size=m["vocabulary"], rms_norm_eps=m["norm_epsilon"],
        hidden_act=_theirs(GATED_ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_bias=m["use_bias"], mlp_bias=m["use_bias"], initializer_range=m["init_std"], **_rope(m),
    )  # fmt: skip


def _llama_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    found = [Tensor("tokens/embedding", ("model.embed_tokens.weight",))]
    found += [Tensor("final_norm/scale", ("model.norm.weight",))]
    for i in range(m["layers"]):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        found += [Tensor(f"{ours}/attention_norm/scale", (f"{theirs}.input_layernorm.weight",))]
        found += [Tensor(f"{ours}/mlp_norm/scale", (f"{theirs}.post_attention_layernorm.weight",))]
        found += _qkv(f"{ours}/attention/qkv", f"{theirs}.self_attn", m)
        found += _linear(f"{ours}/attention/out", f"{theirs}.self_attn.o_proj", m["use_bias"])
        for part in ("gate", "up", "down"):
            found += _linear(f"{ours}/mlp/{part}", f"{theirs}.mlp.{part}_proj", m["use_bias"])
        if m["qk_norm"]:
            found += [
                Tensor(f"{ours}/attention/{q}_norm/scale", (f"{theirs}.self_attn.{q}_norm.weight",)) for q in "qk"
            ]
    return found


def _mistral_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return _llama_model(h) | dict(windows=(h.get("sliding_window", 4096) or 0,))


def _mistral_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return _llama_config(m) | dict(sliding_window=max(each_layer(m)) or None)


def _qwen2_windows(h: Mapping[str, Any]) -> tuple[int, ...]:
    if not h.get("use_sliding_window") or not h.get("sliding_window"):
        return (0,)
    layers, first = h["num_hidden_layers"], h.get("max_window_layers", 28)
    kinds = h.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return pattern([h["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds])


def _qwen2_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return _llama_model(h) | dict(qkv_bias=True, windows=_qwen2_windows(h))


def _qwen2_config(m: Mapping[str, Any]) -> dict[str, Any]:
    windows = each_layer(m)
    full = windows.index(max(windows)) if max(windows) else m["layers"]
    config = _llama_config(m) | dict(
        use_sliding_window=max(windows) > 0, sliding_window=max(windows) or None, max_window_layers=full,
        layer_types=["sliding_attention" if window else "full_attention" for window in windows],
    )  # fmt: skip
    del config["attention_bias"], config["mlp_bias"]
    return config


def _qwen3_model(h: Mapping[str, Any]) -> dict[str, Any]:
    _needs(h, attention_bias=False)
    return _llama_model(h) | dict(qk_norm=True, windows=_qwen2_windows(h))


LLAMA_BUFFERS = r"rotary_emb\.inv_freq$"
NEO_BUFFERS = r"\.attn\.attention\.(bias|masked_bias)$"
OPENAI_BUFFERS = r"\.attn\.(bias|masked_bias)$|position_ids$"

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", OPENAI_BUFFERS, _gpt2_model, _gpt2_config, _gpt2_tensors),
    "openai-gpt": Family(
        "OpenAIGPTLMHeadModel", "transformer.", OPENAI_BUFFERS, _gpt1_model, _gpt1_config, _gpt1_tensors
    ),
    "gpt_neo": Family("GPTNeoForCausalLM", "transformer.", NEO_BUFFERS, _neo_model, _neo_config, _neo_tensors),
    "llama": Family("LlamaForCausalLM", "model.", LLAMA_BUFFERS, _llama_model, _llama_config, _llama_tensors),
    "mistral": Family("MistralForCausalLM", "model.", LLAMA_BUFFERS, _mistral_model, _mistral_config, _llama_tensors),
    "qwen2": Family("Qwen2ForCausalLM", "model.", LLAMA_BUFFERS, _qwen2_model, _qwen2_config, _llama_tensors),
    "qwen3": Family("Qwen3ForCausalLM", "model.", LLAMA_BUFFERS, _qwen3_model, _qwen2_config, _llama_tensors),
}


def model_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of transformers' config, and its `config.model`.

    Raises:
      DataError: another family, a switch that gptjax does not have, or a key that is missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise DataError(f"config.json: model_type={kind} is not supported; there are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind], FAMILIES[kind].to_model(config)
    except KeyError as error:
        raise DataError(f"config.json lacks {error.args[0]}") from error


def config_of(model: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that computes the same as a `config.model`, and transformers' config for it.

    A config fits when it survives the way there and back.

    Raises:
      ConfigError: none does; tells the nearest and where it differs.
    """
    nearest: tuple[str, list[str]] | None = None
    for kind, family in FAMILIES.items():
        config, there, back = family.to_config(model), meaning(model), meaning(_read_back(family, model))
        differing = [f"{key} {there[key]}" for key in sorted(there) if there[key] != back.get(key)]
        if not differing:
            return family, {"model_type": kind, "architectures": [family.architecture]} | config
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = kind, differing
    assert nearest
    raise ConfigError(f"no Hugging Face family is this model; {nearest[0]} is nearest, without {', '.join(nearest[1])}")


def _read_back(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    # What the family makes of a model; with an activation of its own where it has no name for the model's.
    for activation in (model["activation"], "gelu_tanh"):
        try:
            return family.to_model(family.to_config({**model, "activation": activation}))
        except DataError:
            pass
    return family.to_model(family.to_config({**model, "activation": "swiglu"}))


def meaning(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `config.model` that decide what it computes, each said in one way."""
    flat = flatten(dict(model, attention_scale=model["attention_scale"] or 1 / math.sqrt(model["head_width"])))
    flat["windows"] = each_layer(model)
    unused = r"dropout|init_std|residual_init|scan_layers|remat"
    if model["positions"] != "rotary":
        unused += r"|rotary\..*"
    elif model["rotary"]["scaling"] == "none":
        unused += r"|rotary\.(?!theta).*"
    elif model["rotary"]["scaling"] == "linear":
        unused += r"|rotary\.(low|high|original).*"
    if model["mlp"] != "experts":
        unused += r"|experts.*|load_balance_loss|router_z_loss"
    return {key: value for key, value in flat.items() if not re.fullmatch(unused, key)}


def tensors_of(family: Family, model: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of a model: one entry for each of its parameters."""
    head = Tensor("head/kernel", ("lm_head.weight",), transposed=True)
    return family.tensors(model) + ([] if model["tied_head"] else [head])
