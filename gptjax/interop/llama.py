"""Llama's families: Llama, Mistral, Qwen 2 and Qwen 3."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.translation import (
    NEUTRAL,
    Family,
    Tensor,
    each_layer,
    linear,
    named,
    needs,
    pattern,
    qkv,
    theirs_of,
)

GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def _rotary(h: Mapping[str, Any]) -> dict[str, Any]:
    rope = h.get("rope_parameters") or {**(h.get("rope_scaling") or {}), "rope_theta": h.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = named({"default": "none", "linear": "linear", "llama3": "llama3"}, kind, "rope_type")
    needs(rope, partial_rotary_factor=1.0)
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
    needs(h, attention_bias=bias)
    return NEUTRAL | dict(
        layers=h["num_hidden_layers"], heads=H, kv_heads=h.get("num_key_value_heads") or H,
        head_width=h.get("head_dim") or D // H, width=D, mlp_width=h["intermediate_size"],
        context=h["max_position_embeddings"], vocabulary=h["vocab_size"], positions="rotary", rotary=_rotary(h),
        norm="rmsnorm", norm_epsilon=h.get("rms_norm_eps", 1e-6), use_bias=bias, qkv_bias=bias,
        activation=named(GATED_ACTIVATIONS, h.get("hidden_act", "silu"), "hidden_act"),
        tied_head=h.get("tie_word_embeddings", False), init_std=h.get("initializer_range", 0.02),
    )  # fmt: skip


def _llama_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"],
        head_dim=m["head_width"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        max_position_embeddings=m["context"], vocab_size=m["vocabulary"], rms_norm_eps=m["norm_epsilon"],
        hidden_act=theirs_of(GATED_ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_bias=m["use_bias"], mlp_bias=m["use_bias"], initializer_range=m["init_std"], **_rope(m),
    )  # fmt: skip


def _llama_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    found = [Tensor("tokens/embedding", ("model.embed_tokens.weight",))]
    found += [Tensor("final_norm/scale", ("model.norm.weight",))]
    for i in range(m["layers"]):
        ours, theirs = f"block_{i}", f"model.layers.{i}"
        found += [Tensor(f"{ours}/attention_norm/scale", (f"{theirs}.input_layernorm.weight",))]
        found += [Tensor(f"{ours}/mlp_norm/scale", (f"{theirs}.post_attention_layernorm.weight",))]
        found += qkv(f"{ours}/attention/qkv", f"{theirs}.self_attn", m)
        found += linear(f"{ours}/attention/out", f"{theirs}.self_attn.o_proj", m["use_bias"])
        for part in ("gate", "up", "down"):
            found += linear(f"{ours}/mlp/{part}", f"{theirs}.mlp.{part}_proj", m["use_bias"])
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
    needs(h, attention_bias=False)
    return _llama_model(h) | dict(qk_norm=True, windows=_qwen2_windows(h))


_BUFFERS = r"rotary_emb\.inv_freq$"

LLAMA = Family("LlamaForCausalLM", "model.", _BUFFERS, _llama_model, _llama_config, _llama_tensors)
MISTRAL = Family("MistralForCausalLM", "model.", _BUFFERS, _mistral_model, _mistral_config, _llama_tensors)
QWEN2 = Family("Qwen2ForCausalLM", "model.", _BUFFERS, _qwen2_model, _qwen2_config, _llama_tensors)
QWEN3 = Family("Qwen3ForCausalLM", "model.", _BUFFERS, _qwen3_model, _qwen2_config, _llama_tensors)
