"""GPT-NeoX and Pythia (arXiv 2204.06745): parallel sublayers, rotary positions on a part of each head's columns."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.hf_config import COMMON, fixed, key
from gptjax.interop.llama import rope_config, rotary_model
from gptjax.interop.openai import ACTIVATIONS
from gptjax.interop.weight_mapping import NEUTRAL, Family, Tensor, head_width, hf_name_of, linear, lookup, norm

KEYS = COMMON | dict(
    vocab_size=key("size", 50_432), hidden_size=key("size", 6144), num_hidden_layers=key("layers", 44),
    num_attention_heads=key("size", 64), intermediate_size=key("size", 24_576), hidden_act=key("name", "gelu"),
    hidden_dropout=key("number", 0.0), max_position_embeddings=key("count", 2048),
    initializer_range=key("number", 0.02), layer_norm_eps=key("number", 1e-5), tie_word_embeddings=key("flag", False),
    use_parallel_residual=key("flag", True), attention_bias=fixed(True), is_decoder=fixed(False),
    rope_parameters=key("object", None), is_encoder_decoder=fixed(False),
    # Keys of older configs, which transformers moves into `rope_parameters`.
    rope_scaling=key("object", None), rotary_emb_base=key("positive", 10_000.0), rotary_pct=key("positive", 0.25),
    original_max_position_embeddings=key("count", None),
)  # fmt: skip
RESIDUALS = {True: "parallel", False: "pre"}


def to_model(h: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config.model` of transformers' config."""
    D, H = h["hidden_size"], h["num_attention_heads"]
    rotary = rotary_model({**h, "rope_theta": h["rotary_emb_base"], "partial_rotary_factor": h["rotary_pct"]})
    return NEUTRAL | dict(
        layers=h["num_hidden_layers"], heads=H, kv_heads=H,
        head_width=head_width(D, H, "hidden_size={} and num_attention_heads={}"), width=D,
        mlp_width=h["intermediate_size"], vocabulary=h["vocab_size"], **rotary,
        norm_position=RESIDUALS[h["use_parallel_residual"]], norm_epsilon=h["layer_norm_eps"],
        activation=lookup(ACTIVATIONS, h["hidden_act"], "hidden_act"), tied_head=h["tie_word_embeddings"],
        dropout=h["hidden_dropout"], init_std=h["initializer_range"],
    )  # fmt: skip


def to_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Returns transformers' config of a `config.model`."""
    rope = rope_config(m)
    return dict(
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"], hidden_size=m["width"],
        intermediate_size=m["mlp_width"], max_position_embeddings=rope["max_position_embeddings"],
        vocab_size=m["vocabulary"], rotary_emb_base=rope["rope_theta"], rotary_pct=m["rotary"]["fraction"],
        rope_scaling=rope["rope_scaling"], use_parallel_residual=m["norm_position"] == "parallel",
        layer_norm_eps=m["norm_epsilon"], hidden_act=hf_name_of(ACTIVATIONS, m["activation"]),
        tie_word_embeddings=m["tied_head"], hidden_dropout=m["dropout"], attention_dropout=m["dropout"],
        initializer_range=m["init_std"],
    )  # fmt: skip


def tensors(m: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of each parameter; queries, keys and values of a head lie side by side, as in gptjax."""
    found = [Tensor("tokens/embedding", ("gpt_neox.embed_in.weight",))]
    found += norm("final_norm", "gpt_neox.final_layer_norm")
    for i in range(m["layers"]):
        name, hf_name = f"block_{i}", f"gpt_neox.layers.{i}"
        found += norm(f"{name}/attention_norm", f"{hf_name}.input_layernorm")
        found += norm(f"{name}/mlp_norm", f"{hf_name}.post_attention_layernorm")
        found += linear(f"{name}/attention/qkv", f"{hf_name}.attention.query_key_value", bias=True)
        found += linear(f"{name}/attention/out", f"{hf_name}.attention.dense", bias=True)
        found += linear(f"{name}/mlp/up", f"{hf_name}.mlp.dense_h_to_4h", bias=True)
        found += linear(f"{name}/mlp/down", f"{hf_name}.mlp.dense_4h_to_h", bias=True)
    return found


GPT_NEOX = Family(
    "GPTNeoXForCausalLM", "gpt_neox.", r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", KEYS, to_model,
    to_config, tensors, renames={r"^embed_out\.": "lm_head."},
)  # fmt: skip
