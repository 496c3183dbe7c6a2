"""OpenAI's families and the one after them: GPT-1, GPT-2 and GPT-Neo."""

from collections.abc import Mapping
from typing import Any

from gptjax.config import DataError
from gptjax.interop.translation import (
    NEUTRAL,
    Family,
    Tensor,
    conv,
    each_layer,
    linear,
    named,
    needs,
    norm,
    pattern,
    qkv,
    qkv_pieces,
    theirs_of,
)

# transformers' activation names; the first of ours is what is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
OPENAI_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

# GPT-2


def _openai_model(h: Mapping[str, Any], activation: str) -> dict[str, Any]:
    # What the configs of GPT-1 and GPT-2 say in the same words.
    return NEUTRAL | dict(
        layers=h["n_layer"], heads=h["n_head"], kv_heads=h["n_head"], head_width=h["n_embd"] // h["n_head"],
        width=h["n_embd"], mlp_width=h.get("n_inner") or 4 * h["n_embd"], context=h["n_positions"],
        vocabulary=h["vocab_size"], norm_epsilon=h.get("layer_norm_epsilon", 1e-5), activation=activation,
        tied_head=h.get("tie_word_embeddings", True), dropout=h.get("resid_pdrop", 0.1),
        init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _gpt2_model(h: Mapping[str, Any]) -> dict[str, Any]:
    needs(h, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    activation = named(ACTIVATIONS, h.get("activation_function", "gelu_new"), "activation_function")
    return _openai_model(h, activation) | dict(residual_init="scaled")


def _gpt2_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        n_layer=m["layers"], n_head=m["heads"], n_embd=m["width"], n_inner=m["mlp_width"], n_positions=m["context"],
        vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=theirs_of(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        resid_pdrop=m["dropout"], embd_pdrop=m["dropout"], attn_pdrop=m["dropout"], initializer_range=m["init_std"],
    )  # fmt: skip


def _openai_block(i: int, m: Mapping[str, Any]) -> list[Tensor]:
    ours, theirs = f"block_{i}", f"transformer.h.{i}"
    return [
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *conv(f"{ours}/attention/qkv", f"{theirs}.attn.c_attn", **qkv_pieces(m)),
        *conv(f"{ours}/attention/out", f"{theirs}.attn.c_proj"),
        *conv(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *conv(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]


def _gpt2_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *norm("final_norm", "transformer.ln_f")]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i, m)]


# GPT-1


def _gpt1_model(h: Mapping[str, Any]) -> dict[str, Any]:
    activation = named(OPENAI_ACTIVATIONS, h.get("afn", "gelu"), "afn")
    # Its MLP has no width of its own.
    return _openai_model(h, activation) | dict(norm_position="post", mlp_width=4 * h["n_embd"])


def _gpt1_config(m: Mapping[str, Any]) -> dict[str, Any]:
    config = _gpt2_config(m)
    for key in ("n_inner", "activation_function"):
        del config[key]
    return config | dict(afn=theirs_of(OPENAI_ACTIVATIONS, m["activation"]))


def _gpt1_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    ends = [Tensor("tokens/embedding", ("transformer.tokens_embed.weight",))]
    ends += [Tensor("positions/embedding", ("transformer.positions_embed.weight",))]
    return ends + [tensor for i in range(m["layers"]) for tensor in _openai_block(i, m)]


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
        activation=named(ACTIVATIONS, h.get("activation_function", "gelu_new"), "activation_function"),
        tied_head=h.get("tie_word_embeddings", True), dropout=h.get("resid_dropout", 0.0),
        init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _neo_config(m: Mapping[str, Any]) -> dict[str, Any]:
    windows = each_layer(m)
    kinds = ["local" if window else "global" for window in windows]
    return dict(
        num_layers=m["layers"], num_heads=m["heads"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        max_position_embeddings=m["context"], vocab_size=m["vocabulary"], layer_norm_epsilon=m["norm_epsilon"],
        activation_function=theirs_of(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_types=[[kinds, 1]], attention_layers=kinds, window_size=max(windows) or 256,
        resid_dropout=m["dropout"], embed_dropout=m["dropout"], attention_dropout=m["dropout"],
        initializer_range=m["init_std"],
    )  # fmt: skip


def _neo_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    found = [Tensor("tokens/embedding", ("transformer.wte.weight",))]
    found += [Tensor("positions/embedding", ("transformer.wpe.weight",)), *norm("final_norm", "transformer.ln_f")]
    for i in range(m["layers"]):
        ours, theirs = f"block_{i}", f"transformer.h.{i}"
        found += norm(f"{ours}/attention_norm", f"{theirs}.ln_1")
        found += norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
        found += qkv(f"{ours}/attention/qkv", f"{theirs}.attn.attention", m)
        found += linear(f"{ours}/attention/out", f"{theirs}.attn.attention.out_proj", bias=True)
        found += linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", bias=True)
        found += linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", bias=True)
    return found


_BUFFERS = r"\.attn\.(bias|masked_bias)$|position_ids$"
_NEO_BUFFERS = r"\.attn\.attention\.(bias|masked_bias)$"

GPT1 = Family("OpenAIGPTLMHeadModel", "transformer.", _BUFFERS, _gpt1_model, _gpt1_config, _gpt1_tensors)
GPT2 = Family("GPT2LMHeadModel", "transformer.", _BUFFERS, _gpt2_model, _gpt2_config, _gpt2_tensors)
GPT_NEO = Family("GPTNeoForCausalLM", "transformer.", _NEO_BUFFERS, _neo_model, _neo_config, _neo_tensors)
