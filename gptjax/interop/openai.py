"""OpenAI's families and the one after them: GPT-1, GPT-2 and GPT-Neo."""

from collections.abc import Mapping
from typing import Any

from gptjax.config.errors import DataError
from gptjax.interop.hf_config import COMMON, fixed, key
from gptjax.interop.weight_mapping import (
    NEUTRAL,
    Family,
    Tensor,
    conv,
    head_width,
    hf_name_of,
    layer_windows,
    linear,
    lookup,
    norm,
    qkv,
    qkv_layout,
    window_pattern,
)

# transformers' activation names; of several for one activation the first is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
OPENAI_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

# GPT-2

_KEYS = COMMON | dict(
    n_positions=key("size", 512), n_embd=key("size", 768), n_layer=key("layers", 12), n_head=key("size", 12),
    layer_norm_epsilon=key("number", 1e-5), tie_word_embeddings=key("flag", True), resid_pdrop=key("number", 0.1),
    initializer_range=key("number", 0.02), is_encoder_decoder=fixed(False),
)  # fmt: skip
GPT1_KEYS = _KEYS | dict(vocab_size=key("size", 40_478), afn=key("name", "gelu"))
GPT2_KEYS = _KEYS | dict(
    vocab_size=key("size", 50_257), n_positions=key("size", 1024), n_inner=key("size", None),
    activation_function=key("name", "gelu_new"), scale_attn_weights=fixed(True),
    scale_attn_by_inverse_layer_idx=fixed(False), add_cross_attention=fixed(False),
)  # fmt: skip


def _openai_model(h: Mapping[str, Any], activation: str) -> dict[str, Any]:
    # Keys shared by GPT-1 and GPT-2.
    return NEUTRAL | dict(
        layers=h["n_layer"], heads=h["n_head"], kv_heads=h["n_head"],
        head_width=head_width(h["n_embd"], h["n_head"], "n_embd={} and n_head={}"), width=h["n_embd"],
        mlp_width=4 * h["n_embd"], context=h["n_positions"], vocabulary=h["vocab_size"],
        norm_epsilon=h["layer_norm_epsilon"], activation=activation, tied_head=h["tie_word_embeddings"],
        dropout=h["resid_pdrop"], init_std=h["initializer_range"],
    )  # fmt: skip


def _gpt2_model(h: Mapping[str, Any]) -> dict[str, Any]:
    model = _openai_model(h, lookup(ACTIVATIONS, h["activation_function"], "activation_function"))
    return model | dict(residual_init="scaled", mlp_width=h["n_inner"] or model["mlp_width"])


def _gpt2_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        n_layer=m["layers"], n_head=m["heads"], n_embd=m["width"], n_inner=m["mlp_width"], n_positions=m["context"],
        vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=hf_name_of(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        resid_pdrop=m["dropout"], embd_pdrop=m["dropout"], attn_pdrop=m["dropout"], initializer_range=m["init_std"],
    )  # fmt: skip


def _openai_block(i: int, m: Mapping[str, Any]) -> list[Tensor]:
    name, hf_name = f"block_{i}", f"transformer.h.{i}"
    return [
        *norm(f"{name}/attention_norm", f"{hf_name}.ln_1"),
        *norm(f"{name}/mlp_norm", f"{hf_name}.ln_2"),
        *conv(f"{name}/attention/qkv", f"{hf_name}.attn.c_attn", **qkv_layout(m)),
        *conv(f"{name}/attention/out", f"{hf_name}.attn.c_proj"),
        *conv(f"{name}/mlp/up", f"{hf_name}.mlp.c_fc"),
        *conv(f"{name}/mlp/down", f"{hf_name}.mlp.c_proj"),
    ]


def _gpt2_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *norm("final_norm", "transformer.ln_f")]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i, m)]


# GPT-1


def _gpt1_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return _openai_model(h, lookup(OPENAI_ACTIVATIONS, h["afn"], "afn")) | dict(norm_position="post")


def _gpt1_config(m: Mapping[str, Any]) -> dict[str, Any]:
    config = _gpt2_config(m)
    del config["n_inner"], config["activation_function"]
    return config | dict(afn=hf_name_of(OPENAI_ACTIVATIONS, m["activation"]))


def _gpt1_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.tokens_embed.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.positions_embed.weight",))]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i, m)]


# GPT-Neo


NEO_KEYS = COMMON | dict(
    vocab_size=key("size", 50_257), max_position_embeddings=key("size", 2048), hidden_size=key("size", 2048),
    num_layers=key("layers", 24), attention_types=key("lists", None), attention_layers=key("names", None),
    num_heads=key("size", 16), intermediate_size=key("size", None), window_size=key("count", 256),
    activation_function=key("name", "gelu_new"), resid_dropout=key("number", 0.0),
    layer_norm_epsilon=key("number", 1e-5), initializer_range=key("number", 0.02),
    tie_word_embeddings=key("flag", True), is_encoder_decoder=fixed(False),
)  # fmt: skip


def _neo_kinds(h: Mapping[str, Any]) -> list[str]:
    # Of attention, a layer's each; transformers' class makes `attention_layers` from `attention_types`.
    groups = h["attention_types"] or [[["global", "local"], 12]]
    kinds = h["attention_layers"]
    count = sum(len(names) * times for names, times in groups) if kinds is None else len(kinds)
    if count != h["num_layers"]:
        raise DataError(f"config.json: attention_types speak of {count} layers, num_layers of {h['num_layers']}")
    return [kind for names, times in groups for _ in range(times) for kind in names] if kinds is None else kinds


def _neo_model(h: Mapping[str, Any]) -> dict[str, Any]:
    of_kind = {"global": 0, "local": h["window_size"]}
    windows = [lookup(of_kind, kind, "attention_types") for kind in _neo_kinds(h)]
    D, H = h["hidden_size"], h["num_heads"]
    return NEUTRAL | dict(
        layers=h["num_layers"], heads=H, kv_heads=H, head_width=head_width(D, H, "hidden_size={} and num_heads={}"),
        width=D, context=h["max_position_embeddings"], mlp_width=h["intermediate_size"] or 4 * D,
        vocabulary=h["vocab_size"], windows=window_pattern(windows), attention_scale=1.0, qkv_bias=False,
        norm_epsilon=h["layer_norm_epsilon"],
        activation=lookup(ACTIVATIONS, h["activation_function"], "activation_function"),
        tied_head=h["tie_word_embeddings"], dropout=h["resid_dropout"], init_std=h["initializer_range"],
    )  # fmt: skip


def _neo_config(m: Mapping[str, Any]) -> dict[str, Any]:
    windows = layer_windows(m)
    kinds = ["local" if window else "global" for window in windows]
    return dict(
        num_layers=m["layers"], num_heads=m["heads"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        max_position_embeddings=m["context"], vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=hf_name_of(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_types=[[kinds, 1]], attention_layers=kinds, window_size=max(windows) or 256,
        resid_dropout=m["dropout"], embed_dropout=m["dropout"], attention_dropout=m["dropout"],
        initializer_range=m["init_std"],
    )  # fmt: skip


def _neo_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    tensors = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    tensors += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *norm("final_norm", "transformer.ln_f")]
    for i in range(m["layers"]):
        name, hf_name = f"block_{i}", f"transformer.h.{i}"
        tensors += norm(f"{name}/attention_norm", f"{hf_name}.ln_1")
        tensors += norm(f"{name}/mlp_norm", f"{hf_name}.ln_2")
        tensors += qkv(f"{name}/attention/qkv", f"{hf_name}.attn.attention", m)
        tensors += linear(f"{name}/attention/out", f"{hf_name}.attn.attention.out_proj", bias=True)
        tensors += linear(f"{name}/mlp/up", f"{hf_name}.mlp.c_fc", bias=True)
        tensors += linear(f"{name}/mlp/down", f"{hf_name}.mlp.c_proj", bias=True)
    return tensors


_BUFFERS = r"\.attn\.(bias|masked_bias)$|position_ids$"
_NEO_BUFFERS = r"\.attn\.attention\.(bias|masked_bias)$"

GPT1 = Family("OpenAIGPTLMHeadModel", "transformer.", _BUFFERS, GPT1_KEYS, _gpt1_model, _gpt1_config, _gpt1_tensors)
GPT2 = Family("GPT2LMHeadModel", "transformer.", _BUFFERS, GPT2_KEYS, _gpt2_model, _gpt2_config, _gpt2_tensors)
GPT_NEO = Family("GPTNeoForCausalLM", "transformer.", _NEO_BUFFERS, NEO_KEYS, _neo_model, _neo_config, _neo_tensors)
