"""Llama's families: Llama, Mistral, Qwen 2 and Qwen 3."""

from collections.abc import Mapping
from typing import Any

from gptjax.config.errors import DataError
from gptjax.interop.hf_config import COMMON, abbreviated, fixed, key, read
from gptjax.interop.weight_mapping import (
    NEUTRAL,
    Family,
    Tensor,
    head_width,
    hf_name_of,
    layer_windows,
    linear,
    lookup,
    qkv,
    require,
    window_pattern,
)
from gptjax.models.rotary import SCALINGS

GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


KEYS = COMMON | dict(
    vocab_size=key("size", 32_000), hidden_size=key("size", 4096), intermediate_size=key("size", 11_008),
    num_hidden_layers=key("layers", 32), num_attention_heads=key("size", 32), num_key_value_heads=key("size", None),
    head_dim=key("size", None), hidden_act=key("name", "silu"), max_position_embeddings=key("count", 2048),
    initializer_range=key("number", 0.02), rms_norm_eps=key("number", 1e-6), tie_word_embeddings=key("flag", False),
    rope_parameters=key("object", None), is_encoder_decoder=fixed(False),
    # Keys of older configs, which transformers moves into `rope_parameters`.
    rope_scaling=key("object", None), rope_theta=key("positive", 10_000.0),
    partial_rotary_factor=key("positive", None), original_max_position_embeddings=key("count", None),
)  # fmt: skip
LLAMA_KEYS = KEYS | dict(attention_bias=key("flag", False), mlp_bias=key("flag", False))
MISTRAL_KEYS = KEYS | dict(
    intermediate_size=key("size", 14_336), num_key_value_heads=key("size", 8, null=True),
    max_position_embeddings=key("count", 131_072), sliding_window=key("count", 4096, null=True),
    layer_types=key("names", None),
)  # fmt: skip
QWEN2_KEYS = KEYS | dict(
    vocab_size=key("size", 151_936), intermediate_size=key("size", 22_016),
    num_key_value_heads=key("size", 32, null=True), max_position_embeddings=key("count", 32_768),
    use_sliding_window=key("flag", False), sliding_window=key("count", 4096, null=True),
    max_window_layers=key("index", 28), layer_types=key("names", None),
)  # fmt: skip
QWEN3_KEYS = QWEN2_KEYS | dict(head_dim=key("size", 128), attention_bias=fixed(False))

# Keys of `rope_parameters` and `rope_scaling`; the type determines which are read, and transformers ignores the others.
ROPE_KEYS = dict(
    rope_type=key("name", None), type=key("name", None), rope_theta=key("positive", None),
    factor=key("positive", None), low_freq_factor=key("positive", None), high_freq_factor=key("positive", None),
    original_max_position_embeddings=key("count", None), partial_rotary_factor=key("positive", None),
    attention_factor=key("positive", None), beta_fast=key("positive", None), beta_slow=key("positive", None),
    truncate=key("flag", None),
)  # fmt: skip
UNUSED_ROPE_KEYS = {"mscale", "mscale_all_dim", "short_factor", "long_factor"}


def rotary_model(h: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of `config.model` for rotary positions."""
    # transformers.modeling_rope_utils: `rope_scaling` precedes `rope_parameters`, and both precede other keys.
    where = "rope_scaling" if h["rope_scaling"] else "rope_parameters"
    given = h[where] or {}
    rope = read(given, ROPE_KEYS, where=f"config.json: {where}")
    kind = rope["rope_type"] if "rope_type" in given else rope["type"] if "type" in given else "default"
    name = lookup({"default": "none"} | {name: name for name in SCALINGS if name != "none"}, kind, "rope_type")
    scaling = SCALINGS[name]
    unknown = given.keys() - ROPE_KEYS.keys() - (UNUSED_ROPE_KEYS - set(scaling.hf_unsupported))
    for name_in_json in sorted(one for one in unknown if given[one] is not None):
        raise DataError(f"config.json: {where} has {abbreviated(name_in_json)}, which gptjax does not know")
    lacking = [hf_name for hf_name in scaling.hf_required if rope[hf_name] is None]
    theta = rope["rope_theta"] if "rope_theta" in given else h["rope_theta"]
    if lacking or theta is None:
        raise DataError(f"config.json: {where} of type {kind} lacks {', '.join(lacking) or 'rope_theta'}")
    part = rope["partial_rotary_factor"] if "partial_rotary_factor" in given else h["partial_rotary_factor"]
    before = h["original_max_position_embeddings"] or rope["original_max_position_embeddings"]
    longest = h["max_position_embeddings"]
    rope = rope | {"original_max_position_embeddings": before or longest, "max_position_embeddings": longest}
    own = {key: rope[hf_name] for key, hf_name in scaling.hf_names.items() if rope[hf_name] is not None}
    rotary = NEUTRAL["rotary"] | dict(theta=float(theta), fraction=1.0 if part is None else part, scaling=name)
    context = round(longest * rope["factor"]) if "max_position_embeddings" in scaling.hf_names.values() else longest
    return dict(context=context, positions="rotary", rotary=rotary | ({name: rotary[name] | own} if own else {}))


def rope_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Returns transformers' keys for the rotary positions of a `config.model`."""
    r, scaling = m["rotary"], m["rotary"]["scaling"]
    own = {hf_name: r[scaling][key] for key, hf_name in SCALINGS[scaling].hf_names.items()}
    given = {hf_name: value for hf_name, value in own.items() if value is not None}
    return dict(
        max_position_embeddings=given.pop("max_position_embeddings", m["context"]),
        rope_theta=r["theta"],
        rope_scaling=None if scaling == "none" else dict(rope_type=scaling, **given),
    )


def decoder_model(h: Mapping[str, Any], bias: bool = False) -> dict[str, Any]:
    """Returns the keys of `config.model` that all of Llama's families share."""
    D, H, positions = h["hidden_size"], h["num_attention_heads"], rotary_model(h)
    if (part := positions["rotary"]["fraction"]) != 1:
        raise DataError(f"config.json: partial_rotary_factor={part} is not supported, only 1.0")
    return NEUTRAL | dict(
        layers=h["num_hidden_layers"], heads=H, kv_heads=h["num_key_value_heads"] or H,
        head_width=h["head_dim"] or head_width(D, H, "hidden_size={} and num_attention_heads={}"),
        width=D, mlp_width=h["intermediate_size"], vocabulary=h["vocab_size"], **positions,
        norm="rmsnorm", norm_epsilon=h["rms_norm_eps"], use_bias=bias,
        qkv_bias=bias, activation=lookup(GATED_ACTIVATIONS, h["hidden_act"], "hidden_act"),
        tied_head=h["tie_word_embeddings"], init_std=h["initializer_range"],
    )  # fmt: skip


def _llama_model(h: Mapping[str, Any]) -> dict[str, Any]:
    require(h, attention_bias=h["mlp_bias"])
    return decoder_model(h, bias=h["mlp_bias"])


def llama_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Llama's config of a `config.model`."""
    return dict(
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"], num_key_value_heads=m["kv_heads"],
        head_dim=m["head_width"], hidden_size=m["width"], intermediate_size=m["mlp_width"],
        vocab_size=m["vocabulary"], rms_norm_eps=m["norm_epsilon"],
        hidden_act=hf_name_of(GATED_ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        attention_bias=m["use_bias"], mlp_bias=m["use_bias"], initializer_range=m["init_std"], **rope_config(m),
    )  # fmt: skip


def llama_tensors(m: Mapping[str, Any]) -> list[Tensor]:
    """Returns Llama's tensors of each parameter."""
    tensors = [Tensor("tokens/embedding", ("model.embed_tokens.weight",))]
    tensors += [Tensor("final_norm/scale", ("model.norm.weight",))]
    for i in range(m["layers"]):
        name, hf_name = f"block_{i}", f"model.layers.{i}"
        tensors += [Tensor(f"{name}/attention_norm/scale", (f"{hf_name}.input_layernorm.weight",))]
        tensors += [Tensor(f"{name}/mlp_norm/scale", (f"{hf_name}.post_attention_layernorm.weight",))]
        tensors += qkv(f"{name}/attention/qkv", f"{hf_name}.self_attn", m)
        tensors += linear(f"{name}/attention/out", f"{hf_name}.self_attn.o_proj", m["use_bias"])
        for part in ("gate", "up", "down"):
            tensors += linear(f"{name}/mlp/{part}", f"{hf_name}.mlp.{part}_proj", m["use_bias"])
        if m["qk_norm"] != "none":
            tensors += [
                Tensor(f"{name}/attention/{q}_norm/scale", (f"{hf_name}.self_attn.{q}_norm.weight",)) for q in "qk"
            ]
    return tensors


def _windows(h: Mapping[str, Any], window: int | None, kinds: list[str] | None) -> tuple[int, ...]:
    # The window of each layer by its type; the same for all if there are no types.
    layers = h["num_hidden_layers"]
    if kinds is None:
        return (window or 0,)
    if len(kinds) != layers:
        raise DataError(f"config.json: layer_types speak of {len(kinds)} layers, num_hidden_layers of {layers}")
    of_kind = {"full_attention": 0, "attention": 0, "sliding_attention": window}  # "attention": of older configs
    windows = [lookup(of_kind, kind, "layer_types") for kind in kinds]
    if None in windows:
        raise DataError("config.json: layer_types has sliding_attention, but there is no sliding_window")
    return window_pattern([window for window in windows if window is not None])


def _mistral_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_model(h) | dict(windows=_windows(h, h["sliding_window"], h["layer_types"]))


def _mistral_config(m: Mapping[str, Any]) -> dict[str, Any]:
    return llama_config(m) | dict(sliding_window=max(layer_windows(m)) or None)


def _qwen2_windows(h: Mapping[str, Any]) -> tuple[int, ...]:
    window, first = h["sliding_window"] if h["use_sliding_window"] else None, h["max_window_layers"]
    types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(h["num_hidden_layers"])]
    return _windows(h, window, h["layer_types"] if h["layer_types"] is not None else types)


def _qwen2_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_model(h) | dict(qkv_bias=True, windows=_qwen2_windows(h))


def _qwen2_config(m: Mapping[str, Any]) -> dict[str, Any]:
    windows = layer_windows(m)
    full = windows.index(max(windows)) if max(windows) else m["layers"]
    config = llama_config(m) | dict(
        use_sliding_window=max(windows) > 0, sliding_window=max(windows) or None, max_window_layers=full,
        layer_types=["sliding_attention" if window else "full_attention" for window in windows],
    )  # fmt: skip
    del config["attention_bias"], config["mlp_bias"]
    return config


def _qwen3_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_model(h) | dict(qk_norm="head", windows=_qwen2_windows(h))


BUFFERS = r"rotary_emb\.inv_freq$"

LLAMA = Family("LlamaForCausalLM", "model.", BUFFERS, LLAMA_KEYS, _llama_model, llama_config, llama_tensors)
MISTRAL = Family("MistralForCausalLM", "model.", BUFFERS, MISTRAL_KEYS, _mistral_model, _mistral_config, llama_tensors)
QWEN2 = Family("Qwen2ForCausalLM", "model.", BUFFERS, QWEN2_KEYS, _qwen2_model, _qwen2_config, llama_tensors)
QWEN3 = Family("Qwen3ForCausalLM", "model.", BUFFERS, QWEN3_KEYS, _qwen3_model, _qwen2_config, llama_tensors)
